"""The NLIRG curve, against the published function written out in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yrunner.losses.nlirg import ZONES, nlirg_weight, zone_of

FLOAT32_EPSILON = 1.1920928955078125e-07
JUST_ABOVE_3 = 3.0000003
JUST_UNDER_15 = 14.999


def published(loss, max_lr=1.0, x0=1.2, min_lr=5e-8, k=1.7, loss_threshold=3.0, loss_deadline=15.0):
    """The published formula, one loss at a time."""
    if loss >= loss_deadline:
        return 0.0
    if loss <= loss_threshold:
        return max_lr / (1 + math.exp(-k * (loss - x0))) + FLOAT32_EPSILON
    return max_lr / (1 + math.exp(loss - 6.2)) + FLOAT32_EPSILON + min_lr


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (0.0, 0.11507),
        (1.2, 0.5),
        (3.0, 0.95521),
        (JUST_ABOVE_3, 0.96083),
        (6.2, 0.5),
        (JUST_UNDER_15, 0.00015),
        (15.0, 0.0),
        (1000.0, 0.0),
        (math.inf, 0.0),
        (math.nan, 0.0),
    ],
)
def test_the_curve_passes_through_the_published_values(loss: float, weight: float):
    assert nlirg_weight(torch.tensor([loss])).item() == pytest.approx(weight, abs=1e-5)


@given(st.floats(min_value=0, max_value=40))
def test_the_weight_equals_the_published_function_at_any_loss(loss: float):
    weight = nlirg_weight(torch.tensor([loss], dtype=torch.float64)).item()
    assert weight == pytest.approx(published(loss), abs=1e-6)


@given(
    losses=st.lists(st.floats(min_value=0, max_value=30), min_size=1, max_size=20),
    max_lr=st.floats(0.1, 5),
    x0=st.floats(0, 3),
    k=st.floats(0.1, 5),
    min_lr=st.floats(0, 0.1),
    loss_threshold=st.floats(0.5, 6),
    above=st.floats(0.1, 10),
)
def test_every_published_parameter_has_its_published_meaning(
    losses, max_lr, x0, k, min_lr, loss_threshold, above
):
    parameters = dict(max_lr=max_lr, x0=x0, k=k, min_lr=min_lr, loss_threshold=loss_threshold)
    parameters["loss_deadline"] = loss_threshold + above
    weights = nlirg_weight(torch.tensor(losses, dtype=torch.float64), **parameters)
    expected = [published(loss, **parameters) for loss in losses]
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_two_constants_of_the_falling_branch_can_be_set():
    loss_N = torch.tensor([5.0])
    weight = nlirg_weight(loss_N, hard_center=4.0, hard_slope=2.0).item()
    assert weight == pytest.approx(1 / (1 + math.exp(2.0)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_have_the_shape_and_dtype_of_the_losses(dtype: torch.dtype):
    weight = nlirg_weight(torch.rand(3, 4, dtype=dtype))
    assert weight.shape == (3, 4)
    assert weight.dtype == dtype
    assert nlirg_weight(torch.zeros(0)).shape == (0,)


def test_zones_are_counted_at_their_published_borders():
    losses = torch.tensor([0.0, 1.45, 1.46, 6.59, 6.6, 14.9, 15.0, 99.0, math.nan])
    assert dict(zip(ZONES, zone_of(losses).bincount().tolist(), strict=True)) == {
        "easy": 2,
        "learning": 2,
        "hard": 2,
        "refused": 3,
    }


def test_refusing_begins_where_the_recipe_puts_the_deadline():
    losses = torch.tensor([1.0, 4.0, 5.0, 9.0])
    assert zone_of(losses, loss_deadline=5.0).tolist() == [0, 1, 3, 3]
