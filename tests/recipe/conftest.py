"""A folder with a data file and a model folder, where a recipe is written and loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe

VALID = """\
name: legal
model:
  base: ./base
data:
  train:
    - file: rows.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, so that messages show short relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "base").mkdir()
    return tmp_path


@pytest.fixture
def valid() -> str:
    """Six lines that load; a test adds its own from line 7 on."""
    return VALID


@pytest.fixture
def problems(folder: Path) -> Callable[..., list[str]]:
    """Load a text as recipe.yaml and return the lines of the error; none when it loads."""

    def load(content: str | bytes, *overrides: str) -> list[str]:
        path = Path("recipe.yaml")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            load_recipe(path, overrides)
        except RecipeError as error:
            assert str(error) == "\n".join(map(str, error.problems))
            return [str(problem) for problem in error.problems]
        return []

    return load
