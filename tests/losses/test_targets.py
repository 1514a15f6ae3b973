"""The loss of each target, against a loop over rows and positions."""

import pytest
import torch
from torch.nn.functional import log_softmax

from yrunner.losses.chunked_loss import logit_targets
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.targets import (
    PLAIN,
    Targets,
    TokenWeight,
    at_least_float32,
    predicting_columns,
    sum_targets,
    target_places,
    weigh,
)
from yrunner.tokens import IGNORE_INDEX


def slow_losses(logits_BTV, labels_BT):
    """Minus the log-probability of each target, given everything before it."""
    losses = []
    for row in range(labels_BT.shape[0]):
        for place in range(1, labels_BT.shape[1]):
            label = labels_BT[row, place].item()
            if label != IGNORE_INDEX:
                losses.append(-log_softmax(logits_BTV[row, place - 1], dim=-1)[label])
    return torch.stack(losses) if losses else torch.zeros(0)


def target_losses(logits_BTV, labels_BT):
    """What a model that falls back to its own logits gets, at the columns it is asked for."""
    columns_K = predicting_columns(labels_BT)
    is_target_BK, labels_N = target_places(labels_BT, columns_K)
    logits_NV = at_least_float32(logits_BTV[:, columns_K][is_target_BK])
    return logit_targets(logits_NV, labels_N, PLAIN).loss_N


@pytest.mark.parametrize("share_of_targets", [0.0, 0.1, 1.0])
def test_the_places_of_targets_are_the_same_among_all_columns_and_among_those_asked_for(
    share_of_targets: float,
):
    logits_BTV, labels_BT = random_batch(1, share_of_targets)
    is_target_BT, labels_N = target_places(labels_BT)
    loss_N = logit_targets(logits_BTV[:, :-1][is_target_BT], labels_N, PLAIN).loss_N
    torch.testing.assert_close(loss_N, target_losses(logits_BTV, labels_BT))


def random_batch(seed: int, share_of_targets: float):
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(3, 9, 11, generator=generator) * 3
    labels_BT = torch.randint(11, (3, 9), generator=generator)
    labels_BT[torch.rand(3, 9, generator=generator) > share_of_targets] = IGNORE_INDEX
    labels_BT[:, 0] = IGNORE_INDEX
    return logits_BTV, labels_BT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share_of_targets", [0.0, 0.1, 0.5, 1.0])
def test_target_losses_equal_a_loop_over_rows_and_positions(seed: int, share_of_targets: float):
    logits_BTV, labels_BT = random_batch(seed, share_of_targets)
    losses = target_losses(logits_BTV, labels_BT)
    torch.testing.assert_close(losses, slow_losses(logits_BTV, labels_BT))


def test_no_logits_are_asked_for_where_nothing_is_predicted():
    labels_BT = torch.full((2, 6), IGNORE_INDEX)
    assert predicting_columns(labels_BT).tolist() == []
    labels_BT[0, 3], labels_BT[1, 5] = 7, 7
    assert predicting_columns(labels_BT).tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype):
    logits_BTV, labels_BT = random_batch(0, 1.0)
    losses = target_losses(logits_BTV.to(dtype), labels_BT)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, slow_losses(logits_BTV.to(dtype).float(), labels_BT))


NLIRG = TokenWeight(lambda loss_N, _: nlirg_weight(loss_N))


def of_losses(loss_N, weight=NLIRG):
    """Targets of which only the losses matter: entropy 1, the first one hit, each pulls with 2."""
    weight_N = weight.of(loss_N.detach(), torch.ones_like(loss_N))
    is_top_N = torch.zeros_like(loss_N)
    is_top_N[:1] = 1
    weighted = weigh(weight_N, loss_N).sum()
    one_N = torch.ones_like(loss_N)
    return Targets(weighted, loss_N.detach(), one_N, weight_N, is_top_N, 2 * one_N)


def test_it_is_the_gradient_that_is_weighed_not_the_weight_that_is_learned():
    loss_N = torch.tensor([0.1, 2.0, 5.0, 20.0], requires_grad=True)
    of_losses(loss_N).weighted.backward()
    torch.testing.assert_close(loss_N.grad, nlirg_weight(loss_N.detach()))


def test_the_record_holds_the_sums_of_all_targets():
    loss_N = torch.tensor([0.1, 2.0, 3.0, 7.0, 20.0])
    record = sum_targets(of_losses(loss_N))
    weight_N = nlirg_weight(loss_N).double()
    zones, gradients = [1, 2, 1, 1], [2, 4, 2, 2]
    expected = [32.1, (weight_N * loss_N.double()).sum(), weight_N.sum(), 5, 1, 1]
    expected += [*zones, *gradients, 5]
    torch.testing.assert_close(record, torch.tensor(expected, dtype=torch.float64))


def test_a_refused_token_with_an_infinite_loss_leaves_the_others_alone():
    loss_N = torch.tensor([2.0, float("inf")], requires_grad=True)
    targets = of_losses(loss_N)
    targets.weighted.backward()
    assert targets.weighted.isfinite()
    assert loss_N.grad[0].item() > 0
    assert loss_N.grad[1].item() == 0


def test_no_target_has_a_record_of_zeros():
    assert sum_targets(of_losses(torch.zeros(0), PLAIN)).tolist() == [0.0] * 15
