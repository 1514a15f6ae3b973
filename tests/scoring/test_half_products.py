"""Products in bfloat16, against float32."""

import pytest
import torch
from torch import nn

from yrunner.scoring import half_products
from yrunner.scoring.half_products import HalfLinear, halve_products
from yrunner.scoring.measure import score_tokens

HALF_A_STEP = torch.finfo(torch.bfloat16).eps / 2


@pytest.fixture
def models(make_model):
    """A model in float32, and the same with its products in bfloat16."""
    whole, half = make_model(seed=3).eval(), make_model(seed=3).eval()
    halve_products(half)
    return whole, half


@pytest.mark.parametrize("is_laid_out", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_rounds_input_weight_and_product_and_nothing_else(
    has_bias, is_laid_out, monkeypatch
):
    can = half_products.lays_out()
    monkeypatch.setattr(half_products, "lays_out", lambda: can and is_laid_out)
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=has_bias)
    if has_bias:
        nn.init.constant_(layer.bias, 1000.123)
    half = nn.Sequential(layer)
    half.get_output_embeddings = lambda: None
    halve_products(half)
    x_TD = torch.randn(3, 5, 96)
    exact = x_TD.bfloat16().double() @ layer.weight.bfloat16().double().T
    bias = layer.bias.detach().double() if has_bias else 0
    found = half(x_TD)
    assert found.dtype == torch.float32
    error = (found.double() - bias - exact).abs()
    # The sum of products, and what float32 keeps beside a large bias.
    assert (error <= 1.01 * HALF_A_STEP * exact.abs() + 1e-4 + 1e-4 * has_bias).all()


def test_head_and_embeddings_stay_as_they_are(models):
    whole, half = models
    head = half.get_output_embeddings()
    assert type(head) is nn.Linear
    assert half.dtype == head.weight.dtype == torch.float32
    shared = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (head.weight is half.get_input_embeddings().weight) == shared
    others = [it for it in half.modules() if isinstance(it, nn.Linear | HalfLinear)]
    assert {type(it) for it in others if it is not head} == {HalfLinear}
    assert {it.weight.dtype for it in others if it is not head} == {torch.bfloat16}


def test_losses_are_near_those_of_float32(models, examples):
    whole, half = (
        torch.cat(
            [it.loss_N for it in score_tokens(one, examples[:12], pad_token_id=0, batch_size=4)]
        )
        for one in models
    )
    assert 0 < (whole - half).abs().max() < 0.05
    assert (whole.mean() - half.mean()).abs() < 0.01
