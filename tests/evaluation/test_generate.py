"""Answers to many prompts at once, against one at a time; and how each token is chosen."""

import numpy as np
import pytest
import torch

from tests.conftest import questions
from yrunner.data.chat.tokenize import prompt_text
from yrunner.data.conversation import Message
from yrunner.evaluation.generate import (
    REFUSED,
    EntropyWarper,
    SeededSampler,
    draw_tokens,
    logits_processors,
    stream_answer,
)
from yrunner.evaluation.refilled import generate_answers
from yrunner.recipe.schema.eval import BeamWriting, DynamicWriting, GreedyWriting, SampleWriting

WAYS = {
    "greedy": GreedyWriting(),
    "penalty": GreedyWriting(repetition_penalty=1.3),
    "sample": SampleWriting(kind="sample", temperature=1.5, top_k=30, top_p=0.9),
    "beams": BeamWriting(kind="beams", num_beams=3),
    "dynamic": DynamicWriting(kind="dynamic", greedy_below=0.1, free_above=1.0),
}


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


def always(model, token):
    """A head that always answers with one token."""
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.model.norm.weight.zero_()
        bias = torch.zeros(model.config.vocab_size)
        bias[token] = 1
        model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.fixture
def prompts(capitals_tokenizer):
    texts = [question for question, _ in questions(6)]
    texts[2] = texts[2] * 5
    return [prompt_text([Message("user", text)], capitals_tokenizer) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_answers_equal_those_of_one_prompt_at_a_time(
    make_talker, capitals_tokenizer, prompts, batch_size, model_type
):
    model = make_talker(seed=3, model_type=model_type)
    answers = generate_answers(
        model, capitals_tokenizer, prompts, max_new_tokens=12, batch_size=batch_size
    )
    slow = [answer_slowly(model, capitals_tokenizer, prompt, 12) for prompt in prompts]
    assert [answer.text for answer in answers] == slow
    assert all(slow), "an empty answer would prove nothing"
    assert len(set(slow)) > 1


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_is_the_same_for_any_batch_size(
    make_talker, capitals_tokenizer, prompts, way
):
    model = make_talker(seed=3)
    answers = [
        generate_answers(
            model,
            capitals_tokenizer,
            prompts,
            max_new_tokens=10,
            batch_size=size,
            generation=WAYS[way],
            seed=5,
        )
        for size in (1, 16)
    ]
    assert answers[0] == answers[1]


def test_a_sample_hangs_on_its_seed_and_differs_from_the_greedy_answer(
    make_talker, capitals_tokenizer, prompts
):
    def write(way, seed):
        return generate_answers(
            make_talker(seed=3),
            capitals_tokenizer,
            prompts,
            max_new_tokens=10,
            batch_size=8,
            generation=WAYS[way],
            seed=seed,
        )

    assert write("sample", 1) == write("sample", 1)
    assert write("sample", 1) != write("sample", 2)
    assert write("sample", 1) != write("greedy", 1)
    assert write("greedy", 1) == write("greedy", 2)


def test_a_recommendation_of_the_model_is_not_followed(make_talker, capitals_tokenizer, prompts):
    plain, opinionated = make_talker(seed=3), make_talker(seed=3)
    opinionated.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=2.0)
    options = {"max_new_tokens": 10, "batch_size": 8}
    assert generate_answers(
        opinionated, capitals_tokenizer, prompts, **options
    ) == generate_answers(plain, capitals_tokenizer, prompts, **options)


def test_an_answer_ends_at_the_end_mark(make_model, capitals_tokenizer, prompts):
    model = always(make_model(), capitals_tokenizer.eos_token_id)
    answers = generate_answers(model, capitals_tokenizer, prompts, max_new_tokens=12, batch_size=4)
    assert [(answer.text, answer.num_tokens, answer.stopped) for answer in answers] == [
        ("", 0, True)
    ] * len(prompts)


def test_an_answer_that_was_cut_off_has_never_stopped(make_model, capitals_tokenizer, prompts):
    (letter,) = capitals_tokenizer("a", add_special_tokens=False)["input_ids"]
    model = always(make_model(), letter)
    (answer,) = generate_answers(
        model, capitals_tokenizer, prompts[:1], max_new_tokens=5, batch_size=4
    )
    assert answer.text == "aaaaa"
    assert answer.num_tokens == 5
    assert not answer.stopped


def test_a_prompt_without_room_for_an_answer_is_refused(make_model, capitals_tokenizer, prompts):
    long = prompts[0].replace("Capital", "Capital " * 600)
    done = []
    first, second = generate_answers(
        make_model(),
        capitals_tokenizer,
        [long, prompts[0]],
        max_new_tokens=4,
        batch_size=4,
        advance=done.append,
    )
    assert first is REFUSED
    assert not second.refused
    assert sum(done) == 2


def test_progress_counts_every_prompt_and_the_model_is_left_as_it_was(
    make_model, capitals_tokenizer, prompts
):
    model = make_model().train()
    done = []
    generate_answers(
        model, capitals_tokenizer, prompts, max_new_tokens=2, batch_size=4, advance=done.append
    )
    assert done == [1] * 6
    assert model.training


@pytest.mark.parametrize("way", ["greedy", "sample", "beams"])
def test_a_streamed_answer_is_the_whole_answer_in_pieces(
    make_talker, capitals_tokenizer, prompts, way
):
    model = make_talker(seed=3)
    pieces = []
    options = {"max_new_tokens": 12, "generation": WAYS[way], "seed": 4}
    streamed = stream_answer(model, capitals_tokenizer, prompts[0], pieces.append, **options)
    (whole,) = generate_answers(model, capitals_tokenizer, prompts[:1], batch_size=1, **options)
    assert streamed == whole
    assert "".join(pieces).strip() == whole.text


NO_IDS = torch.empty(0)


def entropy(logits_V):
    probability_V = logits_V.softmax(-1)
    return float(-(probability_V * probability_V.log()).sum())


def test_tokens_are_drawn_by_their_probability():
    probability_V = torch.tensor([0.1, 0.0, 0.6, 0.3])
    scores_BV = probability_V.log().expand(4000, -1)
    drawn_BV = SeededSampler([(0, number) for number in range(4000)])(NO_IDS, scores_BV)
    shares_V = torch.bincount(drawn_BV.argmax(-1), minlength=4) / 4000
    assert shares_V[1] == 0
    torch.testing.assert_close(shares_V, probability_V, atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [3, 256, 1000])
def test_a_drawn_token_is_that_of_a_sum_over_the_whole_vocabulary(size):
    scores_BV = 4 * torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    scores_BV[:, 1::2] = -torch.inf
    drawn = [0.0, 1 - 2**-53, *np.random.default_rng(0).random(198).tolist()]
    upto_BV = scores_BV.double().softmax(-1).cumsum(-1)
    place_B1 = torch.tensor(drawn, dtype=torch.float64)[:, None] * upto_BV[:, -1:]
    slow_B1 = torch.searchsorted(upto_BV, place_B1, right=True)
    found_B1 = draw_tokens(scores_BV, drawn)
    assert (found_B1 % 2 == 0).all(), "an impossible token is never drawn"
    assert (found_B1 == slow_B1)[2:].all()
    assert found_B1[0] == 0
    assert (found_B1 < size).all()


def test_a_question_draws_the_same_in_any_company_and_another_at_each_step():
    scores_BV = torch.zeros(3, 1000)
    together, alone = SeededSampler([(7, 0), (7, 1), (7, 2)]), SeededSampler([(7, 1)])
    steps = [
        (together(NO_IDS, scores_BV).argmax(-1)[1].item(), alone(NO_IDS, scores_BV[:1]).argmax())
        for _ in range(5)
    ]
    assert all(one == other for one, other in steps)
    assert len({one for one, _ in steps}) > 1


def test_sampling_leaves_the_tokens_that_transformers_would():
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, -1.0, -4.0]])
    kinds = {
        (0, 1): SampleWriting(kind="sample", top_k=2),
        (0, 1, 2): SampleWriting(kind="sample", temperature=1, top_p=0.95),
        (0,): SampleWriting(kind="sample", temperature=1, min_p=0.5),
        (0, 1, 2, 3, 4): SampleWriting(kind="sample", temperature=1),
    }
    for kept, generation in kinds.items():
        scores_BV = logits_BV
        for step in logits_processors(generation, [(0, 0)])[:-1]:
            scores_BV = step(NO_IDS, scores_BV)
        assert tuple(torch.isfinite(scores_BV[0]).nonzero().squeeze(1).tolist()) == kept


def test_a_low_temperature_sharpens():
    scores_BV = torch.tensor([[1.0, 0.0]])
    (warm,) = logits_processors(SampleWriting(kind="sample", temperature=0.25), [(0, 0)])[:-1]
    torch.testing.assert_close(warm(NO_IDS, scores_BV), torch.tensor([[4.0, 0.0]]))


def test_dynamic_is_greedy_where_the_model_is_sure_and_free_where_it_is_not():
    step = EntropyWarper(greedy_below=0.5, free_above=1.0, temperature=0.5, top_k=3)
    sure = torch.tensor([8.0, 1.0, 0.0, 0.0])
    unsure = torch.tensor([1.3, 1.2, 1.1, 1.0])
    between = torch.tensor([2.0, 0.0, -1.0, -9.0])
    freedom = (entropy(between) - 0.5) / 0.5
    assert entropy(sure) < 0.5 < 0.5 + 0.25 * freedom < 1 < entropy(unsure)
    sure_V, unsure_V, between_V = step(NO_IDS, torch.stack([sure, unsure, between]))
    assert torch.isfinite(sure_V).sum() == 1
    assert sure_V.argmax() == 0
    torch.testing.assert_close(unsure_V[:3], unsure[:3] / 0.5)
    assert unsure_V[3] == -torch.inf
    num_left = 1 + round(freedom * 2)
    assert torch.isfinite(between_V).sum() == num_left
    torch.testing.assert_close(between_V[0], between[0] / (freedom * 0.5), rtol=1e-4, atol=0)


def test_greedy_and_beams_leave_the_logits_as_they_are():
    for generation in (GreedyWriting(), BeamWriting(kind="beams")):
        assert not logits_processors(generation, [(0, 0)])
    assert len(logits_processors(DynamicWriting(kind="dynamic"), [(0, 0)])) == 2


@pytest.mark.parametrize("size", [1, 7])
def test_drawing_survives_a_chance_next_to_one(size, monkeypatch):
    class Highest:
        def random(self):
            return float(np.nextafter(1, 0))

    step = SeededSampler([(0, 0)])
    monkeypatch.setattr(step, "_generators", [Highest()])
    assert step(NO_IDS, torch.zeros(1, size)).argmax() == size - 1
