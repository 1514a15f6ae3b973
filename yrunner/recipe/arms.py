"""The arms of an experiment: named sets of overrides, from the recipe or from `--vary`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from yrunner.errors import Problem, RecipeError, YRunnerError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.messages import did_you_mean
from yrunner.recipe.schema.compare import is_fixed
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.yaml_tree import Node, SourceLocation, Unreadable, plain, read_document, shown

VARY_EXAMPLE = "write --vary key=value,value, for example --vary loss.kind=plain,nlirg"


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm of an experiment: its changes to the recipe that all arms share."""

    name: str
    changes: Mapping[str, Any]
    """Values by dotted key; empty for the recipe unchanged."""

    @property
    def overrides(self) -> list[str]:
        """The changes as `key=value`; JSON is YAML on one line."""
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in self.changes.items()}
        return [f"{key}={value}" for key, value in values.items()]


def choose_arms(
    path: Path, overrides: Sequence[str], *, vary: Sequence[str], only: str | None
) -> dict[Arm, Recipe]:
    """The arms to compare, each with its validated recipe; the first is the baseline.

    They are the grid of `vary`, or else the recipe's `compare.arms`; `only` selects some of them,
    in the given order. Raises `RecipeError` with every fault of every arm.
    """
    recipe = load_recipe(path, overrides)
    if vary:
        arms = grid(vary)
    else:
        arms = [Arm(name, changes) for name, changes in recipe.compare.arms.items()]
    if not arms:
        raise YRunnerError(f"{path} has no arms", remedy=f"{VARY_EXAMPLE}, or add compare.arms")
    return _load_arms(path, overrides, _chosen(arms, only))


def grid(vary: Sequence[str]) -> list[Arm]:
    """One arm per combination of the values of several `key=value,value`.

    Raises `YRunnerError` for invalid text, and if two arms get the same name.
    """
    keys = [_read_vary(text) for text in vary]
    arms = []
    for values in product(*(choices for _, choices in keys)):
        changes = {key: plain(value) for (key, _), value in zip(keys, values, strict=True)}
        words = [_word(key, value) for (key, _), value in zip(keys, values, strict=True)]
        arms.append(Arm("_".join(words), changes))
    names = [arm.name for arm in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise YRunnerError(f'--vary makes two arms called "{twice}"', remedy="remove one")
    return arms


def read_seeds(text: str) -> list[int]:
    """The seeds of `--seeds 0,1,2`. Raises `YRunnerError` for anything but a list of seeds."""
    words = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}", word.strip()) for word in words):
        raise YRunnerError(f"--seeds {shown(text)} is not a list of numbers", remedy="write 0,1,2")
    return list(dict.fromkeys(int(word) for word in words))


def _read_vary(text: str) -> tuple[str, list[Node]]:
    key, equals, values = text.partition("=")
    location = SourceLocation(1, 0, 0, f"--vary {shown(text)}")
    if not key.strip() or not equals or not values.strip():
        raise YRunnerError(f"{location}: a key or its values are missing", remedy=VARY_EXAMPLE)
    if is_fixed(key.strip()):
        raise YRunnerError(f"{location}: {key} is the same for every arm", remedy=VARY_EXAMPLE)
    try:
        node, faults = read_document(f"[{values}]", location)
    except Unreadable as error:
        raise YRunnerError(f"{location}: {error}", remedy=VARY_EXAMPLE) from error
    if faults:
        raise YRunnerError(f"{location}: {faults[0].message}", remedy=VARY_EXAMPLE)
    assert isinstance(node.content, list), "brackets make a list"
    return key.strip(), node.content


def _word(key: str, value: Node) -> str:
    """A value's part of the arm's name: `plain` for a kind, else `learning_rate-3e-4`."""
    last = key.split(".")[-1]
    content = plain(value)
    if isinstance(content, dict):
        parts = [content.get("kind", last)]
        parts += [f"{name}-{each}" for name, each in content.items() if name != "kind"]
        text = "-".join(map(str, parts))
    else:
        text = value.text or json.dumps(content)
        text = text if last == "kind" else f"{last}-{text}"
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._") or "arm"


def _chosen(arms: Sequence[Arm], only: str | None) -> list[Arm]:
    if only is None:
        return list(arms)
    by_name = {arm.name: arm for arm in arms}
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in by_name:
            meant = did_you_mean(name, by_name) or f"; the arms are {', '.join(by_name)}"
            raise YRunnerError(f'there is no arm "{shown(name)}"{meant}')
    return [by_name[name] for name in dict.fromkeys(names)]


def _load_arms(path: Path, overrides: Sequence[str], arms: Sequence[Arm]) -> dict[Arm, Recipe]:
    recipes: dict[Arm, Recipe] = {}
    problems: list[Problem] = []
    for arm in arms:
        try:
            recipes[arm] = load_recipe(path, [*overrides, *arm.overrides])
        except RecipeError as error:
            problems += [
                Problem(f"{path}: arm {arm.name}: {problem.where}", problem.path, problem.message)
                for problem in error.problems
            ]
    if problems:
        raise RecipeError(problems)
    return recipes
