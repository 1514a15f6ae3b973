"""Folders of the repository that benchmarks read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
TOY_DATA = RECIPES / "data"
