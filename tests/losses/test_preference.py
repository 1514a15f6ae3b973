"""The losses over pairs, by value and gradient, against their formulas written out."""

import math

import pytest
import torch

from yrunner.losses.preference import (
    bradley_terry_loss,
    dpo_loss,
    kto_baseline,
    kto_loss,
    log_odds,
    orpo_loss,
    simpo_loss,
)

MARGINS = [-700.0, -31.5, -3.0, -0.25, 0.0, 1e-9, 0.7, 4.0, 29.0, 800.0]
MEANS = [-40.0, -5.5, -0.7, -0.69, -0.1, -1e-3]


def doubles(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def log_s(x):
    """The logarithm of the logistic function."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x):
    return math.exp(log_s(x))


FORMS = {
    "sigmoid": lambda d, b, e: -log_s(b * d),
    "conservative": lambda d, b, e: -(1 - e) * log_s(b * d) - e * log_s(-b * d),
    "robust": lambda d, b, e: (-(1 - e) * log_s(b * d) + e * log_s(-b * d)) / (1 - 2 * e),
    "hinge": lambda d, b, e: max(0.0, 1 - b * d),
    "ipo": lambda d, b, e: (d - 1 / (2 * b)) ** 2,
}
SLOPES = {
    "sigmoid": lambda d, b, e: -b * s(-b * d),
    "conservative": lambda d, b, e: -(1 - e) * b * s(-b * d) + e * b * s(b * d),
    "robust": lambda d, b, e: (-(1 - e) * b * s(-b * d) - e * b * s(b * d)) / (1 - 2 * e),
    "hinge": lambda d, b, e: -b if b * d < 1 else 0.0,
    "ipo": lambda d, b, e: 2 * (d - 1 / (2 * b)),
}


@pytest.mark.parametrize("beta", [0.1, 0.5, 7.0])
@pytest.mark.parametrize("form", FORMS)
def test_dpo_is_its_formula(form, beta):
    smoothing = 0.2 if form in ("conservative", "robust") else 0.0
    margin_P = doubles(MARGINS)
    loss_P = dpo_loss(margin_P, form=form, beta=beta, label_smoothing=smoothing)
    expected = [FORMS[form](d, beta, smoothing) for d in MARGINS]
    assert loss_P.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    (slope_P,) = torch.autograd.grad(loss_P.sum(), margin_P)
    expected = [SLOPES[form](d, beta, smoothing) for d in MARGINS]
    assert slope_P.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_without_a_margin_dpo_is_the_logarithm_of_two():
    zero_P = torch.zeros(3)
    assert dpo_loss(zero_P, form="sigmoid", beta=0.1).tolist() == [torch.tensor(2.0).log()] * 3


def test_robust_dpo_is_what_pairs_of_which_some_are_swapped_cost_on_average():
    """Its mean over right and swapped pairs is the loss of the right ones."""
    margin_P, e = doubles(MARGINS[1:-1]), 0.3
    right_P = dpo_loss(margin_P, form="robust", beta=0.4, label_smoothing=e)
    swapped_P = dpo_loss(-margin_P, form="robust", beta=0.4, label_smoothing=e)
    mixed_P = (1 - e) * right_P + e * swapped_P
    torch.testing.assert_close(mixed_P, dpo_loss(margin_P, form="sigmoid", beta=0.4))


def test_simpo_is_its_formula():
    chosen_P, rejected_P = doubles(MEANS), doubles(MEANS[::-1])
    loss_P = simpo_loss(chosen_P, rejected_P, beta=2.5, gamma=0.7)
    pairs = list(zip(MEANS, MEANS[::-1], strict=True))
    assert loss_P.tolist() == pytest.approx([-log_s(2.5 * (a - b) - 0.7) for a, b in pairs])
    slopes = torch.autograd.grad(loss_P.sum(), [chosen_P, rejected_P])
    expected = [-2.5 * s(0.7 - 2.5 * (a - b)) for a, b in pairs]
    assert slopes[0].tolist() == pytest.approx(expected)
    assert slopes[1].tolist() == pytest.approx([-slope for slope in expected])


def test_orpo_is_its_formula():
    chosen_P, rejected_P = doubles(MEANS), doubles(MEANS[::-1])
    loss_P = orpo_loss(chosen_P, rejected_P, beta=0.3)

    def odds(a):
        return a - math.log(-math.expm1(a))

    pairs = list(zip(MEANS, MEANS[::-1], strict=True))
    expected = [-a - 0.3 * log_s(odds(a) - odds(b)) for a, b in pairs]
    assert loss_P.tolist() == pytest.approx(expected, rel=1e-12)
    slopes = torch.autograd.grad(loss_P.sum(), [chosen_P, rejected_P])
    pull = [0.3 * s(odds(b) - odds(a)) for a, b in pairs]
    ours = [-1 - p / -math.expm1(a) for p, (a, _) in zip(pull, pairs, strict=True)]
    theirs = [p / -math.expm1(b) for p, (_, b) in zip(pull, pairs, strict=True)]
    assert slopes[0].tolist() == pytest.approx(ours, rel=1e-10)
    assert slopes[1].tolist() == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1e-30, -1e-8, -0.7, -300.0, -3e4])
def test_the_odds_of_certain_and_of_impossible_answers_are_finite(value, dtype):
    sure_P = torch.tensor([value], dtype=dtype, requires_grad=True)
    other_P = torch.tensor([-2.0], dtype=dtype, requires_grad=True)
    for loss_P in (orpo_loss(sure_P, other_P, beta=1.0), orpo_loss(other_P, sure_P, beta=1.0)):
        slopes = torch.autograd.grad(loss_P.sum(), [sure_P, other_P])
        assert all(part.isfinite().all() for part in (loss_P, *slopes))


def test_log_odds_agree_on_both_sides_of_the_switch():
    values = torch.tensor([math.log(0.5) - 1e-12, math.log(0.5) + 1e-12], dtype=torch.float64)
    assert log_odds(values).abs().max() < 1e-11


@pytest.mark.parametrize("z0", [0.0, 2.5])
def test_kto_is_its_formula(z0):
    ratio_S = doubles(MARGINS)
    is_desirable_S = torch.arange(len(MARGINS)) % 3 == 0
    loss_S = kto_loss(
        ratio_S,
        is_desirable_S,
        torch.tensor(z0, dtype=torch.float64),
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    expected, slopes = [], []
    for r, good in zip(MARGINS, is_desirable_S.tolist(), strict=True):
        x = 0.2 * (r - z0) if good else 0.2 * (z0 - r)
        weight, sign = (1.5, 1) if good else (0.5, -1)
        expected.append(weight * s(-x))
        slopes.append(-weight * sign * 0.2 * s(x) * s(-x))
    assert loss_S.tolist() == pytest.approx(expected, rel=1e-12)
    (slope_S,) = torch.autograd.grad(loss_S.sum(), ratio_S)
    assert slope_S.tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize(
    ("ratios", "expected"), [([1.0, 2.0, 6.0], 3.0), ([-5.0, 1.0], 0.0), ([], 0.0)]
)
def test_the_baseline_of_kto_is_a_mean_that_is_never_negative_and_has_no_gradient(ratios, expected):
    ratio_S = doubles(ratios)
    z0 = kto_baseline(ratio_S.sum(), torch.tensor(float(len(ratios))))
    assert z0.item() == expected and not z0.requires_grad


def test_bradley_terry_is_its_formula():
    chosen_P, rejected_P = doubles([2.0, -1.0, 0.0]), doubles([1.0, 4.0, 0.0])
    loss_P = bradley_terry_loss(chosen_P, rejected_P, margin=0.5, center=0.01)
    pairs = [(2.0, 1.0), (-1.0, 4.0), (0.0, 0.0)]
    expected = [-log_s(a - b - 0.5) + 0.01 * (a + b) ** 2 for a, b in pairs]
    assert loss_P.tolist() == pytest.approx(expected)
    slopes = torch.autograd.grad(loss_P.sum(), [chosen_P, rejected_P])
    pull = [s(b - a + 0.5) for a, b in pairs]
    center = [0.02 * (a + b) for a, b in pairs]
    assert slopes[0].tolist() == pytest.approx([c - p for c, p in zip(center, pull, strict=True)])
    assert slopes[1].tolist() == pytest.approx([c + p for c, p in zip(center, pull, strict=True)])
