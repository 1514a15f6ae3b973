"""The ladder: a module imports only from lower rungs or from its own folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "yrunner"
RUNGS = [
    {"tokens", "errors", "console", "telemetry"},
    {"recipe", "belongings"},
    {"launch", "run_dir", "sort_dir", "replay_dir", "exits"},
    {"data", "losses", "models"},
    {"scoring"},
    {"training", "evaluation", "reports"},
    {"commands"},
    {"cli_start"},
    {"cli"},
]
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "peft", "accelerate", "bitsandbytes"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def place_of(module: Path) -> str:
    """The folder or file of the ladder that a module belongs to."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rung_of(place: str) -> int:
    return next(number for number, places in enumerate(RUNGS) if place in places)


def imports_of(module: Path) -> set[str]:
    """Every module that is imported, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_rungs_or_its_own_folder(module: Path):
    if module.name == "__init__.py":
        assert module.read_text("utf-8") == "", "an __init__.py stays empty"
        return
    own = place_of(module)
    for name in imports_of(module):
        if not name.startswith("yrunner."):
            continue
        other = name.split(".")[1]
        assert other == own or rung_of(other) < rung_of(own), f"{own} must not import {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_first_three_rungs_never_import_torch(module: Path):
    if module.name == "__init__.py" or rung_of(place_of(module)) > 2:
        return
    assert not {name.split(".")[0] for name in imports_of(module)} & HEAVY


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_one_idea_said_in_its_first_line_and_at_most_300_lines(module: Path):
    text = module.read_text("utf-8")
    if text:
        assert ast.get_docstring(ast.parse(text)), "the first line says what the file is for"
    assert len(text.splitlines()) <= 300


def test_there_is_no_drawer_without_a_name():
    drawers = {"utils", "common", "helpers", "misc", "core"}
    assert not drawers & {path.stem for path in PACKAGE.rglob("*")}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "no_such_recipe.yaml"]])
def test_help_and_recipe_errors_answer_without_torch(arguments: list[str]):
    program = (
        "import sys; from yrunner.cli import main; sys.argv = ['yrun', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"assert not {HEAVY!r} & set(sys.modules), set(sys.modules) & {HEAVY!r}"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
