"""NLIRG with entropy: its formula in plain Python, and what it promises about sure and wrong."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.token_weights import nlirg_entropy_weight

DOCUMENT = Path(__file__).parents[2] / "docs/guide/losses.md"
TABLE_ROW = re.compile(r"^\| (\d+) \| ((?:\d\.\d{4} \| ?)+)$", re.MULTILINE)
JUST_UNDER_15 = 14.999

losses, entropies = st.floats(0, 14.9), st.floats(0, 12)
parameters = st.fixed_dictionaries(
    {
        "max_lr": st.floats(0.1, 5),
        "x0": st.floats(0, 3),
        "k": st.floats(0.1, 5),
        "sure_center": st.floats(0.1, 10),
        "sure_slope": st.floats(0.1, 5),
        "floor": st.floats(0, 1),
    }
)


def logistic(x):
    """The logistic function, for any number."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_weight(
    loss,
    entropy,
    max_lr=1.0,
    x0=1.2,
    k=1.7,
    sure_center=4.0,
    sure_slope=1.5,
    floor=0.05,
    loss_deadline=15.0,
):
    """The formula of the docstring, one target at a time."""
    if not loss < loss_deadline:
        return 0.0
    trust = logistic(sure_slope * (sure_center - (loss - entropy)))
    return max_lr * logistic(k * (loss - x0)) * (floor + (1 - floor) * trust)


def weight_of(loss, entropy, **keys):
    both = torch.tensor([[loss], [entropy]], dtype=torch.float64)
    return nlirg_entropy_weight(*both, **keys).item()


@pytest.mark.parametrize(
    ("loss", "entropy", "weight"),
    [
        (0.0, 0.0, 0.1148),
        (1.2, 1.2, 0.4988),
        (4.0, 0.0, 0.5205),
        (4.0, 4.0, 0.9892),
        (8.0, 0.0, 0.0523),
        (8.0, 4.0, 0.5250),
        (8.0, 8.0, 0.9976),
        (JUST_UNDER_15, 0.0, 0.0500),
        (15.0, 15.0, 0.0),
    ],
)
def test_the_weight_passes_through_these_values(loss, entropy, weight):
    assert weight_of(loss, entropy) == pytest.approx(weight, abs=5e-5)


@given(loss=st.floats(0, 30), entropy=entropies, keys=parameters, deadline=st.floats(0.5, 20))
def test_the_weight_equals_its_formula_for_any_parameters(loss, entropy, keys, deadline):
    keys["loss_deadline"] = deadline
    assert weight_of(loss, entropy, **keys) == pytest.approx(
        slow_weight(loss, entropy, **keys), rel=1e-9, abs=1e-12
    )


@given(loss=st.floats(0, 1e6), entropy=st.floats(0, 1e6), keys=parameters)
def test_the_weight_is_a_number_from_0_to_the_height_of_the_curve(loss, entropy, keys):
    assert 0 <= weight_of(loss, entropy, **keys) <= keys["max_lr"]


@given(loss=losses, entropy=entropies, less=st.floats(0, 12), keys=parameters)
def test_of_equal_losses_the_surer_target_never_weighs_more(loss, entropy, less, keys):
    surer = max(entropy - less, 0)
    assert weight_of(loss, surer, **keys) <= weight_of(loss, entropy, **keys)


@given(excess=st.floats(-10, 10), loss=losses, more=st.floats(0, 10), keys=parameters)
def test_of_targets_equally_worse_than_expected_the_harder_never_weighs_less(
    excess, loss, more, keys
):
    harder = min(loss + more, 14.9)
    weights = [weight_of(value, value - excess, **keys) for value in (loss, harder)]
    assert weights[0] <= weights[1] * (1 + 1e-9)


@given(loss=losses, entropy=entropies, keys=parameters)
def test_with_a_floor_of_1_the_entropy_does_not_matter(loss, entropy, keys):
    """What is left is the rising branch of NLIRG, drawn on to the deadline."""
    keys["floor"] = 1.0
    rising = {name: keys[name] for name in ("max_lr", "x0", "k")}
    loss_N = torch.tensor([loss], dtype=torch.float64)
    expected = nlirg_weight(loss_N, loss_threshold=14.99, **rising).item()
    assert weight_of(loss, entropy, **keys) == pytest.approx(expected, abs=1e-6)


@given(loss=losses, above=st.floats(0, 10))
def test_a_target_that_is_no_harder_than_expected_keeps_its_weight(loss, above):
    kept = weight_of(loss, loss + above)
    assert kept == pytest.approx(weight_of(loss, loss + above, floor=1.0), rel=3e-3)


@given(loss=st.floats(9, 14.9))
def test_a_target_that_is_sure_and_wrong_keeps_the_floor(loss: float):
    assert weight_of(loss, 0.0) == pytest.approx(0.05, rel=0.02)


def test_what_is_not_a_number_is_refused():
    loss_N = torch.tensor([math.inf, math.inf, math.nan, 1.0, math.nan])
    entropy_N = torch.tensor([0.0, math.inf, 1.0, math.nan, math.nan])
    assert nlirg_entropy_weight(loss_N, entropy_N).tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_have_the_shape_and_dtype_of_the_losses(dtype: torch.dtype):
    loss, entropy = torch.rand(2, 3, 4, dtype=dtype)
    weight = nlirg_entropy_weight(loss, entropy)
    assert weight.shape == (3, 4)
    assert weight.dtype == dtype


def test_the_table_of_the_document_is_what_the_function_returns():
    rows = TABLE_ROW.findall(DOCUMENT.read_text("utf-8"))
    assert len(rows) == 6
    for loss, cells in rows:
        shown = [float(cell) for cell in cells.strip(" |").split(" | ")]
        found = [weight_of(float(loss), entropy) for entropy in (0, 1, 2, 4, 8)]
        assert shown == pytest.approx(found, abs=5.1e-5)
