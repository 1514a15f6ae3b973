"""Prompts are prepared like other rows: tokenized as at inference, cached, counted."""

import json

import pytest

from tests.conftest import write_jsonl
from tests.data.conftest import ids_of_prompt
from yrunner.data.conversation import Message
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.formats.columns import Need
from yrunner.errors import YRunnerError

ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "level": [1, {"a": None}]},
    {"prompt": [{"role": "user", "content": "七加二?"}], "answer": 9},
    {"prompt": "Spell <|im_end|> for me", "answer": "x"},
    {"prompt": "What is 1 + 1?", "answer": "two"},
]


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """What becomes of rows of prompts, by the rules."""

    def make(rows=ROWS, **rules):
        sources = [Source((write_jsonl(tmp_path / "rows.jsonl", rows),))]
        given = {"rows": "prompts", "max_length": 200, **rules}
        return prepare(sources, tokenizer, Rules(**given), Cache(tmp_path / "cache"))

    return make


def test_a_prompt_has_its_tokens_messages_columns_and_origin(prepared, tokenizer):
    for times in range(2):
        found = prepared(system="Be brief.")
        rows = list(found.train)
        assert found.reports[0].from_cache == (times == 1)
        assert [row.origin.row for row in rows] == [1, 2, 3, 4]
        assert [row.columns["answer"] for row in rows] == ["2", 9, "x", "two"]
        assert rows[0].columns == ROWS[0]
        for row in rows:
            assert row.messages[0] == Message("system", "Be brief.")
            assert row.input_ids == ids_of_prompt(row.messages, tokenizer)
        assert found.train.lengths.tolist() == [len(row.input_ids) for row in rows]
        assert not found.train.num_targets.any()


def test_every_prompt_is_kept_or_refused_and_nothing_is_cut(prepared, tokenizer):
    length = max(len(row.input_ids) for row in prepared().train)
    assert len(prepared(max_length=length + 50, answer_length=50).train) == 4
    for too_long in ("refuse", "drop", "cut", "split"):
        found = prepared(max_length=length + 49, answer_length=50, too_long=too_long)
        (refusal,) = found.reports[0].refusals
        assert refusal.kind == "too_long"
        assert refusal.reason == (
            f"has {length} tokens and its answer up to 50; data.max_length is {length + 49}"
        )
        assert [row.origin.row for row in found.train] == [
            row for row in (1, 2, 3, 4) if row != refusal.origin.row
        ]


def test_what_a_reward_needs_is_part_of_the_key(prepared):
    assert len(prepared().train) == 4
    found = prepared(needs=(Need("answer", "number", "number"),))
    assert [refusal.origin.row for refusal in found.reports[0].refusals] == [3, 4]
    with pytest.raises(YRunnerError) as caught:
        found.check(too_long="refuse", invalid="refuse")
    assert 'row 3: "answer" is "x", which has no number, and the reward "number"' in str(
        caught.value
    )


def test_repeated_prompts_are_found_and_stay_together(prepared):
    found = prepared()
    assert [(it.what, it.count) for it in found.findings] == [("repeated prompts in train", 1)]
    assert found.findings[0].places[0].row == 4
    found.set_validation_aside(0.25, seed=1)
    kept = {json.dumps(row.messages[-1].content) for row in found.train}
    aside = {json.dumps(row.messages[-1].content) for row in found.validation}
    assert aside and kept and not kept & aside
    assert "answers" not in found.as_json()


def test_a_damaged_line_in_the_cache_is_read_anew(prepared, tmp_path):
    prepared()
    (lines,) = (tmp_path / "cache").glob("*/lines.jsonl")
    lines.write_bytes(lines.read_bytes().replace(b"two", b"owt"))
    found = prepared()
    assert not found.reports[0].from_cache
    assert [row.columns["answer"] for row in found.train] == ["2", 9, "x", "two"]
