"""A mutated recipe loads, or fails with a location for every problem."""

import random
import re
from pathlib import Path

import pytest

from tests.recipe.mutations import MUTATIONS, WHOLE, WORDS
from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe


def assert_each_problem_has_a_place(error: RecipeError) -> None:
    for problem in error.problems:
        # A file as a whole has no line: one that is too large, for example.
        assert re.fullmatch(r"recipe\.yaml(:[1-9]\d*:[1-9]\d*)?", problem.where)
        assert problem.message and "\n" not in str(problem)
        assert not re.search(r"Input should|Value error|Extra inputs", problem.message)


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_recipe_loads_or_says_where_it_is_spoilt(seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    path = Path("recipe.yaml")
    path.write_bytes(mutate(chance, WHOLE))
    try:
        load_recipe(path)
    except RecipeError as error:
        assert_each_problem_has_a_place(error)


def test_the_recipe_that_is_spoilt_is_valid(folder: Path) -> None:
    Path("recipe.yaml").write_text(WHOLE)
    assert load_recipe(Path("recipe.yaml")).name == "legal"


@pytest.mark.parametrize("seed", range(40))
def test_a_spoilt_override_loads_or_is_named(seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    Path("recipe.yaml").write_text(WHOLE)
    keys = ["train.epochs", "tuning", "data.train.0", "data.train.x", "", "a.b.c", "name.x", "eval"]
    override = chance.choice(keys) + chance.choice(["=", "", "=="]) + chance.choice(WORDS)
    try:
        load_recipe(Path("recipe.yaml"), [override])
    except RecipeError as error:
        assert all(problem.where for problem in error.problems)
