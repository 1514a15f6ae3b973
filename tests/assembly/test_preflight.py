"""Rows that the model cannot read are known from its config, before any weight is loaded."""

import copy
from pathlib import Path

import pytest

from tests.conftest import questions, write_jsonl
from yrunner.assembly.preflight import check_fit, findings_of_base
from yrunner.assembly.run import Run
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.splits import Prepared
from yrunner.errors import ModelError
from yrunner.models.templates.choose import choose_template


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


@pytest.mark.parametrize("asked", [True, False])
def test_thinking_that_the_prompt_never_asks_for_is_a_finding(
    asked, project: Path, make_model, capitals_tokenizer
):
    thought = "<think>\nIt is known.\n</think>\n\n"
    rows = [{"question": what, "answer": thought + said} for what, said in questions(4)]
    write_jsonl(project / "train.jsonl", rows)
    run = Run.load(project / "tuned.yaml", ["data.validation=[]"])
    run.tokenizer = copy.deepcopy(capitals_tokenizer)
    choose_template(run.tokenizer, "qwen3", {"enable_thinking": asked})
    findings = [it for it in findings_of_base(run, make_model()) if "never asked" in it]
    assert (findings == []) == asked
    assert asked or findings[0].startswith("4 of the first 4 rows have thinking")
