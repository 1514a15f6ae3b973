"""Rows that the model cannot read are known from its config, before any weight is loaded."""

import copy
from pathlib import Path

import pytest

from yrunner.assembly.memory import check_fit
from yrunner.data.dataset.splits import Prepared
from yrunner.errors import ModelError
from yrunner.recipe.load import load_recipe


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused_by_the_config_alone(
    project: Path, make_model, capitals_tokenizer
):
    make_model().config.save_pretrained(project / "base")
    recipe = load_recipe(project / "tuned.yaml", ["model.base=./base"])
    check_fit(recipe, capitals_tokenizer, Prepared())
    larger = copy.deepcopy(capitals_tokenizer)
    larger.add_tokens(["<|another|>"])
    with pytest.raises(ModelError, match=r"has ids up to \d+, the model only \d+ embeddings"):
        check_fit(recipe, larger, Prepared())
