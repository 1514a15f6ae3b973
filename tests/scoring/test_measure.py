"""Scores of every target against full logits of one example at a time; batches by length."""

import random
from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.rounding import rounding
from tests.training.conftest import LOSSES
from yrunner.data.batching.packing import batches_by_length
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import DataError, ModelError, Origin
from yrunner.scoring import measure
from yrunner.scoring.measure import (
    score_by_length,
    score_tokens,
    sum_losses,
)
from yrunner.training.arguments import token_weight


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_each_target_alone_in_order(make_model, examples, batch_size):
    model = make_model().train()
    weight, _ = token_weight(LOSSES["nlirg_entropy"])
    scores = score_tokens(model, examples[:7], pad_token_id=0, batch_size=batch_size, weight=weight)
    for example, scored in zip(examples[:7], scores, strict=True):
        model.eval()
        places = torch.tensor(example.target_positions)
        with torch.no_grad():
            logits_TV = model(torch.tensor([example.input_ids])).logits[0]
        logs_NV = logits_TV[places - 1].log_softmax(-1)
        labels_N = torch.tensor(example.labels)[places]
        loss_N = -logs_NV[torch.arange(len(places)), labels_N]
        entropy_N = -(logs_NV.exp() * logs_NV).sum(-1)
        torch.testing.assert_close(scored.loss_N, loss_N)
        torch.testing.assert_close(scored.entropy_N, entropy_N)
        torch.testing.assert_close(scored.weight_N, weight.of(loss_N, entropy_N))
        assert torch.equal(scored.top_N, logs_NV.argmax(-1))
        assert scored.origin == example.origin


def test_a_model_in_training_mode_stays_in_it(make_model, examples):
    model = make_model().train()
    list(score_tokens(model, examples[:2], pad_token_id=0, batch_size=1))
    assert model.training


@pytest.mark.parametrize("score", [score_tokens, score_by_length])
def test_a_row_longer_than_the_models_positions_is_refused_before_any_is_scored(
    make_model, examples, batches, score
):
    model = make_model()
    longest = max(examples[:7], key=lambda example: len(example.input_ids))
    model.config.max_position_embeddings = len(longest.input_ids) - 1
    size = {"batch_size": 2} if score is score_tokens else {"max_tokens": 100}
    with pytest.raises(DataError, match=r"tokens, and the model has \d+ positions") as caught:
        list(score(model, examples[:7], pad_token_id=0, **size))
    assert caught.value.origin == longest.origin
    assert batches == []


@pytest.fixture
def batches(monkeypatch):
    """The indices of examples in each batch that was computed, by their origins' numbers."""
    computed = []
    score_batch = measure._score_batch

    def note(model, examples, *args):
        computed.append([example.origin.row - 1 for example in examples])
        return score_batch(model, examples, *args)

    monkeypatch.setattr(measure, "_score_batch", note)
    return computed


def figures(scored):
    return torch.stack([scored.loss_N, scored.entropy_N, scored.weight_N, scored.top_N.float()])


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_scores_by_length_are_those_of_each_row_alone(make_model, examples, batches, max_tokens):
    model = make_model()
    alone = list(score_tokens(model, examples, pad_token_id=0, batch_size=1))
    batches.clear()
    options = {"pad_token_id": 0, "max_tokens": max_tokens}
    found = dict(score_by_length(model, examples, **options))
    assert sorted(found) == list(range(len(examples)))
    for index, scored in found.items():
        torch.testing.assert_close(figures(scored), figures(alone[index]))
        assert scored.origin == examples[index].origin
    lengths = [[len(examples[index].input_ids) for index in batch] for batch in batches]
    assert all(len(batch) * max(batch) <= max_tokens or len(batch) == 1 for batch in lengths)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True), "the longest come first"


def test_done_rows_are_skipped_and_change_no_digit_of_the_rest(make_model, examples, batches):
    model = make_model()
    options = {"pad_token_id": 0, "max_tokens": 300}
    whole = list(score_by_length(model, examples, **options))
    all_batches = batches.copy()
    for num_done in (0, 1, 7, 20, 39, 40):
        batches.clear()
        done = {index for index, _ in whole[:num_done]}
        rest = list(score_by_length(model, examples, **options, done=done))
        assert [index for index, _ in rest] == [index for index, _ in whole[num_done:]]
        for (_, scored), (_, expected) in zip(rest, whole[num_done:], strict=True):
            assert torch.equal(figures(scored), figures(expected))
        assert batches == [batch for batch in all_batches if not done.issuperset(batch)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 50])
def test_processes_share_the_rows_and_give_the_same_scores(make_model, examples, num_ranks):
    model = make_model()
    options = {"pad_token_id": 0, "max_tokens": 200}
    alone = dict(score_by_length(model, examples, **options))
    shared = [
        scored
        for rank in range(num_ranks)
        for scored in score_by_length(model, examples, **options, shard=(rank, num_ranks))
    ]
    assert sorted(index for index, _ in shared) == list(range(len(examples)))
    for index, scored in shared:
        assert torch.equal(figures(scored), figures(alone[index]))


def test_closing_the_generator_early_restores_training_mode(make_model, examples):
    model = make_model().train()
    scores = score_by_length(model, examples, pad_token_id=0, max_tokens=100)
    next(scores)
    assert not model.training
    scores.close()
    assert model.training


def test_no_rows_make_no_batches():
    assert batches_by_length([], 100) == []


def test_equal_lengths_keep_their_order():
    assert batches_by_length([2, 3, 2, 3, 2], 6) == [[1, 3], [0, 2, 4]]


def test_contexts_are_projections_of_the_hidden_states_before_the_targets(make_model, examples):
    model = make_model()
    options = {"pad_token_id": 0, "max_tokens": 200}
    scores = dict(score_by_length(model, examples, **options, wants_context=True))
    for index, example in enumerate(examples):
        with torch.no_grad():
            output = model(torch.tensor([example.input_ids]), output_hidden_states=True)
        before = [position - 1 for position in example.target_positions]
        hidden_ND = output.hidden_states[-1][0, before]
        cosine_NN = torch.cosine_similarity(hidden_ND[:, None], hidden_ND[None], dim=2)
        context_NC = scores[index].context_NC
        assert context_NC.dtype == torch.float16
        off_NN = context_NC.float() @ context_NC.float().T - cosine_NN
        assert off_NN.diagonal().abs().max() < 0.01
        assert off_NN.pow(2).mean().sqrt() < 0.1
    assert model.model._forward_hooks == {}, "the hook is removed"


def test_contexts_are_computed_only_on_request(make_model, examples):
    scores = score_by_length(make_model(), examples, pad_token_id=0, max_tokens=200)
    assert all(scored.context_NC is None for _, scored in scores)


def test_a_model_without_hidden_states_names_the_scores_that_need_them(
    make_model, examples, monkeypatch
):
    model = make_model()
    monkeypatch.setattr(type(model), "base_model", property(lambda self: self))
    scores = score_by_length(model, examples, pad_token_id=0, max_tokens=200, wants_context=True)
    with pytest.raises(ModelError, match=r"does not expose its hidden states, which outlier"):
        next(scores)


def choices_of(seed, number=6):
    """Groups of replies to one question each, of uneven numbers and lengths, as random tokens."""
    chance = random.Random(seed)

    def tokens(most):
        return [chance.randint(1, 99) for _ in range(chance.randint(1, most))]

    groups = []
    for _ in range(number):
        question = [7, *tokens(24)]
        replies = [tokens(8) for _ in range(chance.randint(2, 5))]
        groups.append(
            [
                TokenizedExample(
                    question + reply, [-100] * len(question) + reply, Origin(Path("q"), 1)
                )
                for reply in replies
            ]
        )
    return groups


SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": SLIDING,
    "gpt2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {},
}


def model_of(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_replies_after_a_shared_question_cost_what_each_costs_alone(family, batch_size):
    model, groups = model_of(family), choices_of(batch_size)
    found = list(sum_losses(model, groups, pad_token_id=0, batch_size=batch_size))
    assert [len(row) for row in found] == [len(group) for group in groups]
    for row, group in zip(found, groups, strict=True):
        for cost, example in zip(row, group, strict=True):
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            with torch.no_grad():
                log_TV = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            places = [place for place, label in enumerate(labels[0]) if label != -100]
            slow = -sum(float(log_TV[place - 1, ids[0, place]]) for place in places)
            assert cost == pytest.approx(slow, abs=rounding(slow, terms=32 * len(example.labels)))


@pytest.mark.parametrize(
    ("family", "is_shared"), [("qwen3", True), ("lfm2", False), ("bloom", False)]
)
def test_a_question_is_computed_once_where_the_model_keeps_keys_and_values_alone(
    family, is_shared, monkeypatch
):
    model, groups = model_of(family), choices_of(3)
    list(sum_losses(model, groups, pad_token_id=0, batch_size=50))  # tries the fused head out
    sizes = []
    forward = model.base_model.forward

    def count(*args, **kwargs):
        sizes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    count.__signature__ = signature(forward)
    monkeypatch.setattr(model.base_model, "forward", count)
    list(sum_losses(model, groups, pad_token_id=0, batch_size=50))
    replies = [example for group in groups for example in group]
    longest = max(len(group[0].input_ids) - len(group[0].target_positions) for group in groups) - 1
    if is_shared:
        rest = 1 + max(len(example.target_positions) for example in replies)
        assert sizes[1:] == [(len(groups), longest), (len(replies), rest)]
    else:
        assert sizes[1:] == [(len(replies), max(len(example.input_ids) for example in replies))]


def test_replies_to_nothing_share_nothing(make_model):
    examples = [
        TokenizedExample([5, *ids], [-100, *ids], Origin(Path("q"), 1)) for ids in ([6], [8, 9])
    ]
    model = make_model()
    (found,) = sum_losses(model, [examples], pad_token_id=0, batch_size=4)
    slow = [
        float(each.loss_N.sum())
        for each in score_tokens(model, examples, pad_token_id=0, batch_size=1)
    ]
    assert found == pytest.approx(slow, rel=1e-5)
