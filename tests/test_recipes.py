"""Every shipped recipe loads, and editors can check it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from yrunner.commands.fetch import SMOLLM2
from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.messages import recipe_json_schema
from yrunner.recipe.schema.section import FETCHED_GGUF

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
SCHEMA = FOLDER / "recipe.schema.json"


def test_recipes_are_shipped():
    assert {"port_sft.yaml", "tiny_base.yaml", "legal_sft.yaml"} <= {path.name for path in RECIPES}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes beside a model file by the name of the fetched one."""
    root = tmp_path_factory.mktemp("shipped")
    for name in ("recipes", "deepspeed_configs"):
        shutil.copytree(FOLDER.parent / name, root / name)
    (root / "models").mkdir()
    (root / "models" / FETCHED_GGUF).write_bytes(b"GGUF")
    return root / "recipes"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_once_its_model_is_fetched(path: Path, fetched: Path):
    load_recipe(fetched / path.relative_to(FOLDER))


def test_the_demo_says_how_to_get_its_model(fetched: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(fetched, tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipes/port_sft.yaml"))
    for problem in caught.value.problems:  # of the recipe, and of the one that sorts its rows
        assert str(problem).endswith(f"/{FETCHED_GGUF}; run yrun fetch models")
    assert SMOLLM2.member.endswith(f"/{FETCHED_GGUF}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_by_the_json_schema(path: Path):
    Draft202012Validator(recipe_json_schema()).validate(yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_points_editors_at_the_schema(path: Path):
    first = path.read_text("utf-8").splitlines()[0]
    key, _, place = first.partition("$schema=")
    assert key == "# yaml-language-server: "
    assert (path.parent / place).resolve() == SCHEMA


def test_the_schema_beside_the_recipes_is_the_one_that_yrun_prints():
    assert json.loads(SCHEMA.read_text("utf-8")) == recipe_json_schema()


def test_the_guide_shows_the_main_recipe_as_it_is():
    recipe = (FOLDER / "legal_sft.yaml").read_text("utf-8").split("\n", 1)[1].strip()
    guide = FOLDER.parent / "docs/guide/recipe.md"
    assert f"```yaml\n{recipe}\n```" in guide.read_text("utf-8")
