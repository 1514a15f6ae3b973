"""Two models are compared at every token, and what differs is seen."""

import math

import pytest
import torch

from yrunner.models.merge.proof import FEWEST_TOKENS, Probes, Tolerance, compare, logits_at


def test_the_figures_are_those_of_the_slow_way():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(150, 7, generator=generator) for _ in range(2))
    likeness = compare(first, second)
    p, q = first.softmax(1), second.softmax(1)
    assert likeness.tokens == 150
    assert likeness.largest_difference == pytest.approx((first - second).abs().max().item())
    assert likeness.mean_difference == pytest.approx((first - second).abs().mean().item())
    assert likeness.top1_agreement == sum(p.argmax(1) == q.argmax(1)) / 150
    kl = (p * (p / q).log()).sum(1).mean().item()
    assert likeness.mean_kl == pytest.approx(kl, rel=1e-4)


def test_a_vocabulary_that_is_filled_up_is_compared_where_both_have_it():
    logits = torch.randn(5, 7)
    padded = torch.cat([logits, torch.zeros(5, 3)], 1)
    assert compare(logits, padded).largest_difference == 0
    assert compare(padded, logits).top1_agreement == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_bar_lets_through_what_is_not_finite(bad):
    logits = torch.zeros(200, 4)
    broken = logits.clone()
    broken[3, 2] = bad
    assert Tolerance(top1_agreement=0, mean_kl=1e9).faults(compare(logits, broken))
    assert Tolerance(top1_agreement=0, mean_kl=1e9, largest_difference=1e9).faults(
        compare(broken, logits)
    )


def test_a_bar_names_every_figure_that_falls_short():
    likeness = compare(torch.eye(4) * 3, torch.eye(4).flip(1) * 3)
    faults = Tolerance(top1_agreement=0.9, mean_kl=0.1, largest_difference=1.0).faults(likeness)
    assert [fault.split(" is ")[0].split(" differs")[0] for fault in faults] == [
        "a logit", "the likeliest token", "the divergence",
    ]  # fmt: skip
    assert "0.00%" in faults[1]
    assert Tolerance(top1_agreement=0.0, mean_kl=9.0).faults(likeness) == []


def test_the_logits_are_those_of_each_row_alone(make_model):
    model = make_model()
    rows = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    expected = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(logits_at(model, Probes(rows)), expected, rtol=0, atol=1e-5)


def test_of_a_large_vocabulary_fewer_tokens_are_compared_evenly():
    probes = Probes([[1] * 100] * 20)
    rows, _ = probes.places(vocabulary=10_000_000)
    assert FEWEST_TOKENS * 0.9 <= len(rows) <= FEWEST_TOKENS
    assert set(rows.tolist()) == set(range(20))
    assert len(probes.places(vocabulary=100)[0]) == 2000
