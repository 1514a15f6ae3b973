"""Answers of a batch that is refilled, against those of batches that are not."""

from functools import wraps

import pytest

from tests.conftest import questions
from yrunner.data.chat.tokenize import prompt_text
from yrunner.data.conversation import Message
from yrunner.evaluation import refilled
from yrunner.evaluation.generate import REFUSED, Generator
from yrunner.evaluation.refilled import SeededPrompt, answers_as_they_end, generate_answers
from yrunner.recipe.schema.eval import SampleWriting


@pytest.fixture
def prompts(capitals_tokenizer):
    texts = [question for question, _ in questions(6)]
    texts[2] = texts[2] * 5
    return [prompt_text([Message("user", text)], capitals_tokenizer) for text in texts]


def as_they_end(model, tokenizer, prompts, batch_size, **options):
    """The answers in the order of the prompts, and the order in which they ended."""
    asked = [SeededPrompt(text, (7, number)) for number, text in enumerate(prompts)]
    waiting = iter(asked)
    ended = list(
        answers_as_they_end(
            model.eval(),
            tokenizer,
            lambda: next(waiting, None),
            max_new_tokens=12,
            batch_size=batch_size,
            generation=SampleWriting(kind="sample", temperature=1.3, top_k=30),
            **options,
        )
    )
    answers = dict(ended)
    return [answers.get(prompt) for prompt in asked], [prompt.seed[1] for prompt, _ in ended]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_a_batch_that_is_refilled_gives_the_answers_of_fixed_batches(
    make_talker, capitals_tokenizer, prompts, batch_size
):
    many = [*prompts, *prompts[:2], *prompts] * 2
    model = make_talker(seed=3)
    tokens = []
    refilled, order = as_they_end(
        model, capitals_tokenizer, many, batch_size, advance=tokens.append
    )
    fixed = generate_answers(
        model,
        capitals_tokenizer,
        many,
        max_new_tokens=12,
        batch_size=5,
        generation=SampleWriting(kind="sample", temperature=1.3, top_k=30),
        seed=7,
    )
    assert refilled == fixed
    assert {answer.stopped for answer in fixed} == {True, False}
    assert sum(tokens) == sum(answer.num_tokens + answer.stopped for answer in fixed)
    if batch_size == 3:
        assert order != sorted(order), "a short answer does not wait for a long one"


def test_a_model_with_a_window_answers_in_batches_that_are_not_refilled(
    make_talker, capitals_tokenizer, prompts, monkeypatch
):
    model = make_talker(seed=3)
    expected, _ = as_they_end(model, capitals_tokenizer, prompts, 3)
    monkeypatch.setattr(refilled, "DynamicLayer", type("OtherLayer", (), {}))
    sizes = []
    monkeypatch.setattr(
        Generator,
        "write",
        lambda self, ids, seeds, write=Generator.write: (
            sizes.append(len(ids)) or write(self, ids, seeds)
        ),
    )
    found, _ = as_they_end(model, capitals_tokenizer, prompts, 3)
    assert found == expected
    assert sizes == [3, 3]


@pytest.mark.parametrize("batch_size", [2, 5, 40])
def test_what_prompts_begin_with_alike_is_read_once(
    make_talker, capitals_tokenizer, prompts, batch_size, monkeypatch
):
    model = make_talker(seed=3)
    apart, _ = as_they_end(model, capitals_tokenizer, prompts, 1)
    beginning = prompts[0] + "You said: "
    begun = [beginning + prompt for prompt in [*prompts, *prompts[:2]]]
    expected, _ = as_they_end(model, capitals_tokenizer, begun, 1)
    assert expected[:6] != apart
    shapes = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        wraps(forward)(
            lambda *args, **kwargs: (
                shapes.append(tuple(kwargs["input_ids"].shape)) or forward(*args, **kwargs)
            )
        ),
    )
    monkeypatch.setattr(refilled, "WORTH_A_READING", 1)
    found, _ = as_they_end(model, capitals_tokenizer, begun, batch_size)
    assert found == expected
    (rows, size), *readings = [shape for shape in shapes if shape[1] > 1]
    assert rows == 1
    assert size > len(capitals_tokenizer(prompts[0])["input_ids"])
    longest = max(len(capitals_tokenizer(prompt)["input_ids"]) for prompt in begun)
    assert readings
    assert all(tokens <= longest - size for _, tokens in readings)


def test_a_prompt_without_room_is_refused_among_others(make_talker, capitals_tokenizer, prompts):
    long = prompts[0].replace("Capital", "Capital " * 600)
    model = make_talker(seed=3)
    (first, second, third), _ = as_they_end(
        model, capitals_tokenizer, [prompts[0], long, prompts[2]], 2
    )
    assert second is REFUSED
    assert not first.refused and not third.refused


def test_no_answer_is_finished_once_it_is_over(make_talker, capitals_tokenizer, prompts):
    steps = []
    answers, _ = as_they_end(
        make_talker(seed=3),
        capitals_tokenizer,
        prompts,
        2,
        advance=steps.append,
        is_over=lambda: len(steps) == 5,
    )
    assert len(steps) == 5
    assert None in answers
