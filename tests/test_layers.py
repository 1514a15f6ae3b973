"""The laws of the house: floors, rooms of a size, and one name for one thing."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "yrunner"
FLOORS = [
    {"tokens", "errors", "console", "text_files", "machine"},
    {"recipe", "storage", "losses"},
    {"process", "distributed", "data", "models"},
    {"scoring"},
    {"training", "evaluation", "rewards", "reports"},
    {"assembly"},
    {"commands"},
    {"cli"},
]
"""A module imports only from lower floors and from its own folder."""
LEAVES = {"losses", "storage", "data", "scoring", "reports"}
"""Folders that take plain values: they can be called from a notebook, without a recipe."""
WITHOUT_TORCH = {
    "tokens",
    "errors",
    "console",
    "text_files",
    "machine",
    "recipe",
    "storage",
    "process",
}
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "peft", "accelerate", "bitsandbytes"}
MOST_MODULES, MOST_IN_A_FOLDER, DEEPEST_CHAIN, MOST_OF_TRAIN = 275, 15, 17, 15

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
each_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every name that is imported, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules_below(module: str) -> set[str]:
    """The modules of ours that it imports."""
    return {name for name in imports_of(module) if name in MODULES}


def room_of(module: str) -> str:
    """The folder or file on a floor that a module belongs to; each command is a room."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2]) if parts[0] == "commands" else parts[0]


def floor_of(module: str) -> int:
    top = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if top in rooms)


@each_module
def test_a_module_imports_only_from_lower_floors_or_its_own_room(module: str):
    for other in modules_below(module):
        allowed = room_of(other) == room_of(module) or floor_of(other) < floor_of(module)
        assert allowed or floor_of(module) == 0, f"{module} must not import {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    depth_of_chain(tuple(MODULES))


def depth_of_chain(modules: tuple[str, ...]) -> int:
    """Modules on the longest chain of imports; asserts that no chain comes back to its start."""
    depths: dict[str, int] = {}

    def visit(module: str, chain: tuple[str, ...]) -> int:
        assert module not in chain, " -> ".join([*chain[chain.index(module) :], module])
        if module not in depths:
            below = [visit(other, (*chain, module)) for other in modules_below(module)]
            depths[module] = 1 + max(below, default=0)
        return depths[module]

    return max(visit(module, ()) for module in modules)


def test_the_house_stays_small_enough_to_be_known():
    folders = Counter(path.parent for path in MODULES.values())
    crowded = {
        str(folder): number for folder, number in folders.items() if number > MOST_IN_A_FOLDER
    }
    assert not crowded
    assert len(MODULES) <= MOST_MODULES
    assert depth_of_chain(tuple(MODULES)) <= DEEPEST_CHAIN


def test_the_train_command_leaves_the_building_of_its_parts_to_assembly():
    outside = {
        other
        for module in MODULES
        if room_of(module) == "commands/train"
        for other in modules_below(module)
        if room_of(other) != "commands/train"
    }
    assert len(outside) <= MOST_OF_TRAIN, sorted(outside)


def test_no_two_public_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


@each_module
def test_leaf_folders_do_not_know_the_recipe(module: str):
    if module.split(".")[1] in LEAVES:
        assert not {name for name in imports_of(module) if name.startswith("yrunner.recipe")}


@each_module
def test_what_answers_without_torch_never_imports_it(module: str):
    if module.split(".")[1] in WITHOUT_TORCH:
        assert not {name.split(".")[0] for name in imports_of(module)} & HEAVY


@each_module
def test_the_first_line_of_a_module_says_its_one_idea(module: str):
    assert ast.get_docstring(tree_of(module))


def test_packages_are_folders_and_nothing_else():
    folders = {
        parent for path in MODULES.values() for parent in path.parents if PACKAGE in parent.parents
    }
    for folder in folders | {PACKAGE}:
        assert (folder / "__init__.py").read_text("utf-8") == "", folder


def test_there_is_no_drawer_without_a_name():
    drawers = {"utils", "common", "helpers", "misc", "core"}
    assert not drawers & {path.stem for path in PACKAGE.rglob("*")}


def test_tests_lie_in_the_folders_of_what_they_test():
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    others = {Path(name) for name in (".", "benchmarks", "faults", "toy_world")}
    assert not {str(folder) for folder in folders - others if not (PACKAGE / folder).is_dir()}


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
