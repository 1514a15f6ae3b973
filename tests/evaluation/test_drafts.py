"""A model that writes conversations of its own: led to a question, and through it to an answer."""

import pytest
import torch

from yrunner.evaluation.generate import Generated
from yrunner.evaluation.self_replay import ReplayWriter


@pytest.fixture
def make_author(make_talker, capitals_tokenizer):
    def make(model=None, tokenizer=capitals_tokenizer, **changes):
        options = dict(system=None, temperature=1.0, openings=[], max_new_tokens=6, batch_size=4)
        return ReplayWriter(model or make_talker(), tokenizer, **(options | changes))

    return make


def answering(monkeypatch, *turns):
    """Let the model write these turns, one for all prompts, and see what it was given."""
    prompts = []

    def generate(model, tokenizer, given, **options):
        prompts.append((list(given), options))
        return [turns[len(prompts) - 1]] * len(given)

    monkeypatch.setattr("yrunner.evaluation.self_replay.generate_answers", generate)
    return prompts


def test_a_question_begins_behind_the_opening_of_a_user_turn(make_author, monkeypatch):
    prompts = answering(
        monkeypatch, Generated("Who?", 2, stopped=True), Generated("Belo.", 2, stopped=True)
    )
    author = make_author(system="Be brief.")
    (draft,) = author.write([7])
    (first, options), (second, _) = prompts
    rendered = author.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Belo."},
        ],
        tokenize=False,
    )
    assert rendered.startswith(first[0]) and rendered[len(first[0]) :].startswith("Who?")
    assert rendered.startswith(second[0]) and rendered[len(second[0]) :].startswith("Belo.")
    assert options["numbers"] == [7]
    assert [(one.role, one.content) for one in draft.messages] == [
        ("user", "Who?"),
        ("assistant", "Belo."),
    ]
    assert draft.finished


def test_a_question_without_an_end_is_not_answered(make_author, monkeypatch):
    prompts = answering(monkeypatch, Generated("Who", 6, stopped=False), None)
    (draft,) = make_author().write([0])
    assert prompts[1][0] == [], "no prompt is left"
    assert not draft.finished


def test_openings_come_in_turns_and_keep_the_blank_behind_them(make_author, monkeypatch):
    turn = Generated("is it?", 3, stopped=True, began_with_blank=True)
    answering(monkeypatch, turn, Generated("It.", 2, stopped=True))
    drafts = make_author(openings=["What", "Who"]).write([0, 1, 2])
    questions = [draft.messages[0].content for draft in drafts]
    assert questions == ["What is it?", "Who is it?", "What is it?"]


def test_a_model_without_a_template_goes_on_from_its_start(
    make_author, capitals_tokenizer, monkeypatch
):
    prompts = answering(monkeypatch, Generated("Once.", 2, stopped=True))
    monkeypatch.setattr(capitals_tokenizer, "chat_template", None)
    (draft,) = make_author().write([0])
    assert prompts[0][0] == [capitals_tokenizer.bos_token or capitals_tokenizer.eos_token]
    assert [(one.role, one.content) for one in draft.messages] == [("text", "Once.")]


def test_a_mark_in_plain_text_ends_a_question(make_author, capitals_tokenizer, monkeypatch):
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
    (draft,) = make_author().write([0])
    assert draft.messages[0].content == "Who is it?"
    assert draft.finished


def test_what_is_drawn_depends_on_the_number_alone(make_author):
    author = make_author()
    alone = [author.write([number])[0] for number in range(4)]
    with torch.no_grad():
        together = make_author(batch_size=3).write([3, 2, 1, 0])[::-1]
    assert [draft.messages for draft in together] == [draft.messages for draft in alone]
    assert len({draft.messages for draft in alone}) > 1
