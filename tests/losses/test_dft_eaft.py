"""DFT and EAFT, against their formulas written out, and what the documents say of every kind."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.token_weights import EAFT_TOP, dft_weight, eaft_weight, nlirg_entropy_weight
from yrunner.recipe.schema.recipe import EaftLoss, NlirgEntropyLoss, NlirgLoss

DOCUMENTS = Path(__file__).parents[2] / "docs/guide"
KIND_ROW = re.compile(r"^\| [a-z][a-z, ]+ \| ([\d.]+) \| ([\d.]+) \| 1 \| (.+) \|$", re.MULTILINE)
KEY_ROW = re.compile(r"^\| `(\w+)` \| ([\d.e-]+) \|", re.MULTILINE)
entropies = st.floats(0, 12)


def entropy_of_top(logits_V):
    """Entropy of the 20 likeliest tokens, their probabilities scaled to a sum of 1."""
    probability_K = torch.softmax(logits_V, dim=0).sort(descending=True).values[:EAFT_TOP]
    probability_K = probability_K / probability_K.sum()
    return -sum(p * math.log(p) for p in probability_K.tolist() if p > 0)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [(0.0, 1.0), (math.log(2), 0.5), (3.0, 0.049787), (15.0, 3.06e-7), (math.inf, 0.0)],
)
def test_dft_weighs_a_target_by_its_probability(loss: float, weight: float):
    assert dft_weight(torch.tensor([loss])).item() == pytest.approx(weight, rel=1e-3)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_dft_falls_from_1_to_0_with_the_loss(losses: list[float]):
    weight_N = dft_weight(torch.tensor(sorted(losses), dtype=torch.float64))
    assert ((weight_N >= 0) & (weight_N <= 1)).all()
    assert (weight_N.diff() <= 0).all()


@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 10))
def test_the_gradient_of_dft_is_that_of_minus_the_probability(seed: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = spread * torch.randn(5, 30, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(30, (5,), generator=generator)
    gradients = []
    for value in (weighted_loss, minus_probability):
        leaf_NV = logits_NV.clone().requires_grad_()
        value(leaf_NV, labels_N).backward()
        gradients.append(leaf_NV.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def weighted_loss(logits_NV, labels_N):
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    return (dft_weight(loss_N.detach()) * loss_N).sum()


def minus_probability(logits_NV, labels_N):
    return -torch.softmax(logits_NV, dim=1).gather(1, labels_N[:, None]).sum()


@pytest.mark.parametrize(
    ("entropy", "alpha", "weight"),
    [
        (0.0, 1.0, 0.0),
        (math.log(2), 1.0, 0.231378),
        (math.log(2), 2.0, 0.053536),
        (math.log(2), 0.5, 0.481018),
        (math.log(20), 1.0, 1.0),
        (math.log(20), 3.0, 1.0),
    ],
)
def test_eaft_weighs_a_target_by_the_share_of_the_highest_entropy(entropy, alpha, weight):
    found = eaft_weight(torch.tensor([1.0]), torch.tensor([entropy]), alpha=alpha)
    assert found.item() == pytest.approx(weight, abs=1e-5)


def test_eaft_is_1_where_all_tokens_are_alike_and_0_where_one_is_certain():
    alike_V, certain_V = torch.zeros(100), torch.zeros(100)
    certain_V[3] = 200.0
    entropy_N = torch.tensor([entropy_of_top(alike_V), entropy_of_top(certain_V)])
    weight_N = eaft_weight(torch.full((2,), 4.0), entropy_N)
    assert weight_N.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@given(seed=st.integers(0, 2**31), spread=st.floats(0, 10), alpha=st.floats(0.1, 5), loss=entropies)
def test_eaft_equals_its_formula_for_any_prediction(seed, spread, alpha, loss):
    generator = torch.Generator().manual_seed(seed)
    entropy = entropy_of_top(spread * torch.randn(50, generator=generator, dtype=torch.float64))
    weight = eaft_weight(
        torch.tensor([loss]), torch.tensor([entropy], dtype=torch.float64), alpha=alpha
    )
    assert weight.item() == pytest.approx(min(entropy / math.log(20), 1) ** alpha, abs=1e-9)


@given(st.lists(entropies, min_size=2, max_size=20), st.floats(0.1, 5))
def test_eaft_rises_from_0_to_1_with_the_entropy(values: list[float], alpha: float):
    entropy_N = torch.tensor(sorted(values), dtype=torch.float64)
    weight_N = eaft_weight(torch.ones_like(entropy_N), entropy_N, alpha=alpha)
    assert ((weight_N >= 0) & (weight_N <= 1)).all()
    assert (weight_N.diff() >= 0).all()


def test_what_is_not_a_number_is_refused():
    assert dft_weight(torch.tensor([math.inf, math.nan])).tolist() == [0.0, 0.0]
    loss_N = torch.tensor([math.inf, math.nan, 1.0])
    entropy_N = torch.tensor([2.0, 2.0, math.nan])
    assert eaft_weight(loss_N, entropy_N).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_have_the_shape_and_dtype_of_the_losses(dtype: torch.dtype):
    loss, entropy = torch.rand(2, 3, 4, dtype=dtype)
    for weight in (dft_weight(loss), eaft_weight(loss, entropy)):
        assert weight.shape == (3, 4)
        assert weight.dtype == dtype


def test_the_table_of_the_document_is_what_the_functions_return():
    rows = KIND_ROW.findall((DOCUMENTS / "losses.md").read_text("utf-8"))
    assert len(rows) == 5
    for loss, entropy, cells in rows:
        both = torch.tensor([[float(loss)], [float(entropy)]], dtype=torch.float64)
        weights = [nlirg_weight(both[0]), nlirg_entropy_weight(*both)]
        weights += [dft_weight(both[0]), eaft_weight(*both)]
        found = [weight.item() for weight in weights]
        assert [float(cell) for cell in cells.split(" | ")] == pytest.approx(found, abs=5.1e-4)


@pytest.mark.parametrize(
    ("document", "kinds"),
    [("nlirg.md", [NlirgLoss]), ("losses.md", [NlirgEntropyLoss, EaftLoss])],
)
def test_the_documents_name_every_parameter_with_its_default(document, kinds):
    rows = KEY_ROW.findall((DOCUMENTS / document).read_text("utf-8"))
    expected = [
        (name, field.default)
        for kind in kinds
        for name, field in kind.model_fields.items()
        if name not in ("kind", "normalize")
    ]
    assert sorted((name, float(value)) for name, value in rows) == sorted(expected)
