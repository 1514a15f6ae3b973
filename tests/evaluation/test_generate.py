"""Answers of many prompts at once, against one prompt at a time without a cache."""

import pytest
import torch

from tests.conftest import questions
from yrunner.data.conversation import Message
from yrunner.data.render import prompt_text
from yrunner.evaluation.generate import generate_answers


def answer_slowly(model, tokenizer, prompt, max_new_tokens):
    """The most likely next token, again and again, on the whole text each time."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = []
    model.eval()
    while len(new) < max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]), use_cache=False).logits
        new.append(logits[0, -1].argmax().item())
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture
def prompts(capitals_tokenizer):
    texts = [question for question, _ in questions(6)]
    texts[2] = texts[2] * 5
    return [prompt_text([Message("user", text)], capitals_tokenizer) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_answers_equal_those_of_one_prompt_at_a_time(
    make_model, capitals_tokenizer, prompts, batch_size, model_type
):
    model = make_model(seed=3, model_type=model_type)
    answers = generate_answers(
        model, capitals_tokenizer, prompts, max_new_tokens=12, batch_size=batch_size
    )
    assert answers == [answer_slowly(model, capitals_tokenizer, prompt, 12) for prompt in prompts]


def test_an_answer_ends_at_the_end_mark(make_model, capitals_tokenizer, prompts):
    model = make_model()
    with torch.no_grad():
        # A head that always answers with the end mark.
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.model.norm.weight.zero_()
        bias = torch.zeros(model.config.vocab_size)
        bias[capitals_tokenizer.eos_token_id] = 1
        model.lm_head.bias = torch.nn.Parameter(bias)
    answers = generate_answers(model, capitals_tokenizer, prompts, max_new_tokens=12, batch_size=4)
    assert answers == [""] * len(prompts)


def test_progress_counts_every_prompt_and_the_model_is_left_as_it_was(
    make_model, capitals_tokenizer, prompts
):
    model = make_model().train()
    done = []
    generate_answers(
        model, capitals_tokenizer, prompts, max_new_tokens=2, batch_size=4, advance=done.append
    )
    assert done == [4, 2]
    assert model.training
