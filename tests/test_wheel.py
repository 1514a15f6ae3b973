"""What people get who install yrunner: the package, and the recipes and configurations with it."""

import subprocess
import sys
import zipfile
from pathlib import Path

from yrunner.recipe.schema.model import KNOWN_TEMPLATES

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_recipes_data_configurations_and_templates(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "yrunner/py.typed",
        *(f"yrunner/models/templates/{name}.jinja" for name in KNOWN_TEMPLATES),
        "yrunner/reports/page.html.jinja",
        "yrunner/reports/report.html.jinja",
        "yrunner/reports/heat_map.html.jinja",
        "yrunner/reports/heat_map.css",
        "yrunner/reports/heat_map.js",
        "yrunner/reports/sort_page.html.jinja",
        "yrunner/reports/sort_page.css",
        "yrunner/reports/sort_rows.js",
        "yrunner/reports/sort_plots.js",
        "yrunner/reports/sort_list.js",
        "yrunner/reports/sort_page.js",
        "yrunner/reports/eval_page.html.jinja",
        "yrunner/reports/eval_page.css",
        "yrunner/reports/eval_page.js",
        "yrunner/commands/board/static/board.html",
        "yrunner/commands/board/static/board.css",
        "yrunner/commands/board/static/main.js",
        "yrunner/commands/board/static/words.js",
        "yrunner/commands/board/static/uPlot.iife.min.js",
        "yrunner/commands/board/static/uPlot.LICENSE",
        "yrunner/shipped/recipes/legal_sft.yaml",
        "yrunner/shipped/recipes/recipe.schema.json",
        "yrunner/shipped/recipes/data/legal_train.jsonl",
        "yrunner/shipped/deepspeed_configs/zero3.json",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "outputs/", ".venv/"))]


def test_every_configuration_is_one_that_names_a_zero_stage():
    import json

    stages = {
        path.stem: json.loads(path.read_text())["zero_optimization"]["stage"]
        for path in (ROOT / "deepspeed_configs").glob("*.json")
    }
    assert set(stages) >= {"zero1", "zero2", "zero3"}
    assert stages == {name: int(name.removeprefix("zero")[0]) for name in stages}
