"""Rows that the base writes, and the faults for which they are dropped."""

import pytest

from yrunner.data.conversation import Message
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.self_replay import (
    ALIKE,
    Draft,
    ReplayRow,
    ReplayWriter,
    SeenTexts,
    find_fault,
    shingles_of,
)


@pytest.fixture
def make_writer(make_talker, capitals_tokenizer):
    def make(model=None, tokenizer=capitals_tokenizer, **changes):
        options = dict(system=None, temperature=1.0, openings=[], max_new_tokens=6, batch_size=4)
        return ReplayWriter(model or make_talker(), tokenizer, **(options | changes))

    return make


def answering(monkeypatch, *turns):
    """Let the model write these turns, one for all prompts, and see what it was given."""
    prompts = []

    def answers(model, tokenizer, next_prompt, **options):
        for turn in turns:
            given = list(iter(next_prompt, None))
            prompts.append([prompt.text for prompt in given])
            for prompt in given:
                yield prompt, turn

    monkeypatch.setattr("yrunner.evaluation.self_replay.answers_as_they_end", answers)
    return prompts


def write(writer, numbers, series="rows", **options):
    """The rows of these drafts, in their order."""
    drafts = [Draft(series, number) for number in numbers]
    waiting = iter(drafts)
    rows = {row.draft: row for row in writer.write(lambda: next(waiting, None), **options)}
    return [rows[draft] for draft in drafts]


def test_a_question_begins_behind_the_opening_of_a_user_turn(make_writer, monkeypatch):
    prompts = answering(
        monkeypatch, Generated("Who?", 2, stopped=True), Generated("Belo.", 2, stopped=True)
    )
    writer = make_writer(system="Be brief.")
    (row,) = write(writer, [7])
    first, second = prompts
    rendered = writer.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Belo."},
        ],
        tokenize=False,
    )
    assert rendered.startswith(first[0]) and rendered[len(first[0]) :].startswith("Who?")
    assert rendered.startswith(second[0]) and rendered[len(second[0]) :].startswith("Belo.")
    assert row.draft == Draft("rows", 7)
    assert [(one.role, one.content) for one in row.messages] == [
        ("user", "Who?"),
        ("assistant", "Belo."),
    ]
    assert row.finished


@pytest.mark.parametrize("question_ends", [True, False])
@pytest.mark.parametrize("answer_ends", [True, False])
def test_a_question_without_an_end_is_answered_but_the_row_counts_as_unfinished(
    make_writer, monkeypatch, question_ends, answer_ends
):
    prompts = answering(
        monkeypatch,
        Generated("Who", 6, stopped=question_ends),
        Generated("Belo", 6, stopped=answer_ends),
    )
    (row,) = write(make_writer(), [0])
    assert len(prompts[1]) == 1
    assert [one.content for one in row.messages] == ["Who", "Belo"]
    assert row.finished == (question_ends and answer_ends)


def test_an_empty_question_is_not_answered(make_writer, monkeypatch):
    prompts = answering(monkeypatch, Generated("", 0, stopped=True), None)
    (row,) = write(make_writer(), [0])
    assert prompts[1] == []
    assert find_fault(row, SeenTexts()) == "empty"


def test_an_answer_that_was_cut_off_is_kept_without_half_a_character(make_writer, monkeypatch):
    answering(
        monkeypatch, Generated("Who?", 2, stopped=True), Generated("Bel\ufffd", 6, stopped=False)
    )
    (row,) = write(make_writer(), [0])
    assert row.messages[1].content == "Bel"
    assert not row.finished and find_fault(row, SeenTexts()) is None


def test_openings_come_in_turns_and_keep_the_blank_behind_them(make_writer, monkeypatch):
    turn = Generated("is it?", 3, stopped=True, starts_with_blank=True)
    answering(monkeypatch, turn, Generated("It.", 2, stopped=True))
    rows = write(make_writer(openings=["What", "Who"]), [0, 1, 2])
    questions = [row.messages[0].content for row in rows]
    assert questions == ["What is it?", "Who is it?", "What is it?"]


def test_a_model_without_a_template_goes_on_from_its_start(
    make_writer, capitals_tokenizer, monkeypatch
):
    prompts = answering(monkeypatch, Generated("Once.", 2, stopped=True))
    monkeypatch.setattr(capitals_tokenizer, "chat_template", None)
    (row,) = write(make_writer(), [0])
    assert prompts[0] == [capitals_tokenizer.bos_token or capitals_tokenizer.eos_token]
    assert [(one.role, one.content) for one in row.messages] == [("text", "Once.")]


def test_a_mark_in_plain_text_ends_a_question(make_writer, capitals_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer: "
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(capitals_tokenizer, "chat_template", template)
    answering(
        monkeypatch,
        Generated("Who is it?\nAnswer: me", 9, stopped=False),
        Generated("Belo.", 2, stopped=True),
    )
    (row,) = write(make_writer(), [0])
    assert row.messages[0].content == "Who is it?"
    assert row.finished


def test_what_is_drawn_depends_on_series_and_number_alone(make_writer):
    writer = make_writer()
    alone = [write(writer, [number])[0] for number in range(6)]
    together = write(make_writer(batch_size=3), [5, 3, 2, 4, 1, 0])
    assert {row.draft: row for row in together} == {row.draft: row for row in alone}
    assert len({row.messages for row in alone}) > 1
    others = write(writer, range(6), series="held_out")
    assert not {row.messages for row in others} & {row.messages for row in alone}


GOOD = "What is the third letter of the word harbour, and which ones come behind it?"


def draft(*contents, finished=True):
    roles = ("user", "assistant") if len(contents) == 2 else ("text",)
    messages = (Message(role, text) for role, text in zip(roles, contents, strict=True))
    return ReplayRow(Draft("rows", 0), tuple(messages), finished)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (draft(GOOD, "It is r, then b, o, u and r again."), None),
        (draft(GOOD, "It is r, then", finished=False), None),
        (draft("A text of its own, without", finished=False), None),
        (draft(GOOD, ""), "empty"),
        (draft("", "Yes."), "empty"),
        (draft(GOOD, "It is r and then b and " * 12), "loop"),
        (draft("问题是什么？", "港口港口港口" * 10), "loop"),
        (draft("两加二是多少？", "二加二等于四。"), None),
        (draft("A text of its own, with an end."), None),
    ],
)
def test_a_draft_is_dropped_for_what_is_wrong_with_it(found, fault):
    assert find_fault(found, SeenTexts()) == fault


def test_what_was_said_before_is_a_duplicate_even_with_another_word():
    known = SeenTexts()
    known.add("What is the capital of the land of Aru? " * 3)
    known.add(GOOD + "\nIt is r.")
    assert find_fault(draft(GOOD, "It is r."), known) == "duplicate"
    assert find_fault(draft(GOOD.lower(), "it is R!"), known) == "duplicate"
    assert find_fault(draft(GOOD, "It is b."), known) == "duplicate"
    other = GOOD.replace("harbour", "market").replace("third", "first")
    assert find_fault(draft(other, "It is m."), known) is None


def test_likeness_is_the_share_of_the_3_grams_that_both_have():
    texts = ["a b c d e f", "a b c d e g", "b c d e f", "c a", "一二三四五", "一二三四六"]
    for first in texts:
        known = SeenTexts()
        known.add(first)
        for second in texts:
            mine, theirs = shingles_of(first), shingles_of(second)
            assert known.has(second) == (len(mine & theirs) / len(mine | theirs) >= ALIKE)
