"""Rows that the model cannot read are known from its config, before any weight is loaded."""

import copy
from pathlib import Path

import pytest

from yrunner.assembly.preflight import check_fit
from yrunner.assembly.run import Run
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.splits import Prepared
from yrunner.errors import ModelError


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused_by_the_config_alone(
    project: Path, make_model, capitals_tokenizer
):
    make_model().config.save_pretrained(project / "base")
    run = Run.load(project / "tuned.yaml", ["model.base=./base"])
    run.tokenizer, run.dataset = capitals_tokenizer, Prepared(Examples)
    check_fit(run)
    run.tokenizer = larger = copy.deepcopy(capitals_tokenizer)
    larger.add_tokens(["<|another|>"])
    with pytest.raises(ModelError, match=r"has ids up to \d+, the model only \d+ embeddings"):
        check_fit(run)
