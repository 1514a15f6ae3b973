"""Scores of every target against full logits of one example at a time; batches by length."""

import pytest
import torch

from tests.training.conftest import LOSSES
from yrunner.errors import DataError, ModelError
from yrunner.scoring import measure
from yrunner.scoring.measure import batches_by_length, score_by_length, score_tokens
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
    with pytest.raises(ModelError, match=r"does not expose its hidden states, which knn_loss"):
        next(scores)
