"""The walk over chat templates tells a right mask from a wrong one."""

import pytest

from benchmarks.templates import ROWS, STAND_INS, faults_of_run, one, reply, tokenizer_for, walk
from yrunner.data.chat import tokenize


def test_a_template_that_shows_everything_is_read_throughout():
    outcomes = walk(STAND_INS / "gemma4.jinja")
    assert {*outcomes} == {*ROWS}
    assert {outcome.kind for outcome in outcomes.values()} == {"read"}


def test_a_refusal_keeps_its_sentence():
    outcomes = walk(STAND_INS / "tool_plan.jinja")
    assert outcomes["thinking key"].kind == "refused"
    assert outcomes["thinking key"].reason.endswith("omits the thinking of the last reply")


def test_a_broken_template_is_refused_without_its_folder(tmp_path):
    (tmp_path / "broken.jinja").write_text("\n{% for %}")
    assert walk(tmp_path / "broken.jinja")["one turn"].reason.startswith("line 2: ")


@pytest.mark.parametrize(
    ("run", "follows_prompt", "fault"),
    [
        ("It is 4.<|im_end|>", True, None),
        ("It is 4.", True, "no end mark"),
        ("It is 4.<|im_end|>\nand<|im_end|>", True, "more than the end mark"),
        ("<|im_end|>", True, "'It is 4.' is missing"),
        ("assistant\nIt is 4.<|im_end|>", False, "begins before the reply"),
        ("QUESTION\nIt is 4.<|im_end|>", True, "learns another turn"),
    ],
)
def test_each_fault_of_a_mask_is_named(run, follows_prompt, fault):
    tokenizer = tokenizer_for(STAND_INS / "chatml.jinja")
    turn = reply("It is 4.")
    found = [*faults_of_run(run, follows_prompt, True, turn, tokenizer)]
    assert found == [] if fault is None else found[0].startswith(fault)


def test_a_mask_that_is_too_short_is_wrong(monkeypatch):
    find = tokenize.SpanFinder.find
    monkeypatch.setattr(
        tokenize.SpanFinder,
        "find",
        lambda *given: [(start, end - 10) for start, end in find(*given)],
    )
    monkeypatch.setattr("benchmarks.templates.ROWS", {"one turn": one("It is 4.")})
    assert walk(STAND_INS / "chatml.jinja")["one turn"].kind == "wrong"
