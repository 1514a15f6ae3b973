"""LoRA layers with the same input are computed together, and give what peft gives.

In half precision they give more: peft rounds away adapters smaller than half a step of the output.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.models.conftest import MODEL_TYPES, tiny_config
from yrunner.models.layers import joined_lora
from yrunner.models.layers.joined_lora import join_lora
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning


def tuned_pair(tokenizer, model_type="qwen3", **tuning):
    """A model with a trained adapter: as peft computes it, and joined."""
    torch.manual_seed(0)
    model = build_model(tiny_config(model_type), tokenizer, seed=1)
    settings = {"rank": 4, "dropout": 0.0, **tuning}
    theirs = apply_tuning(model, LoraTuning(**settings))
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    ours = deepcopy(theirs)
    join_lora(ours)
    return theirs.train(), ours.train()


def gradients(model, ids_BT):
    model.zero_grad()
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return {name: it.grad for name, it in model.named_parameters() if it.requires_grad}


def are_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    # Beside the largest: those of keys nearly cancel, and are rounding in part.
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) < 1e-5 * largest, name


@pytest.mark.parametrize("variant", ["plain", "rslora"])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "phi3"])
def test_joined_layers_give_the_logits_and_gradients_of_peft(
    model_type, variant, tokenizer, ids_BT
):
    theirs, ours = tuned_pair(tokenizer, model_type, variant=variant)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits)
    are_close(gradients(ours, ids_BT), gradients(theirs, ids_BT))


def test_layers_of_which_some_have_no_adapter_are_computed_alone(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer, targets=["q_proj", "v_proj", "up_proj"])
    are_close(gradients(ours, ids_BT), gradients(theirs, ids_BT))


def test_an_adapter_switched_off_is_the_base(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(ids_BT).logits, theirs(ids_BT).logits)


def test_with_dropout_a_group_drops_the_same_inputs_and_keeps_the_mean(tokenizer):
    _, ours = tuned_pair(tokenizer, dropout=0.25)
    attention = ours.base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    eye = torch.eye(32)
    changes = []
    for _ in range(400):
        outputs = [layer(eye) for layer in layers]
        plain = [layer.base_layer(eye) for layer in layers]
        changes.append([output - base for output, base in zip(outputs, plain, strict=True)])
    for number, layer in enumerate(layers):
        one = changes[0][number].abs().sum(1) == 0
        assert torch.equal(one, changes[0][0].abs().sum(1) == 0), "the same rows are dropped"
        mean = torch.stack([change[number] for change in changes]).mean(0)
        whole = eye @ layer.get_delta_weight("default").T
        # 400 draws with a standard deviation of sqrt(0.25 / 0.75) of the whole.
        assert (mean - whole).norm() < 3 * whole.norm() * (0.25 / 0.75 / 400) ** 0.5
    share = torch.stack([change[0].abs().sum(1) == 0 for change in changes]).float().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / (400 * 32)) ** 0.5


def test_gradients_with_dropout_are_those_of_the_drawn_mask(tokenizer, ids_BT, monkeypatch):
    theirs, ours = tuned_pair(tokenizer, dropout=0.5)
    masks = []

    def draw(layer, shape, device):
        torch.manual_seed(2)  # every layer of a width drops the same places
        masks.append((torch.rand(tuple(shape), device=device) >= 0.5).view(torch.uint8))
        return masks[-1], 0.5

    class Drop(nn.Module):
        def forward(self, x_BTD):
            torch.manual_seed(2)
            return x_BTD * (torch.rand(x_BTD.flatten(0, 1).shape) >= 0.5).view_as(x_BTD) / 0.5

    monkeypatch.setattr(joined_lora, "draw_mask", draw)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Drop()
    are_close(gradients(ours, ids_BT), gradients(theirs, ids_BT))
    assert masks, "ours drew masks"


def test_the_same_random_state_drops_the_same(tokenizer, ids_BT):
    _, ours = tuned_pair(tokenizer, dropout=0.3)
    torch.manual_seed(5)
    first = ours(ids_BT).logits
    second = ours(ids_BT).logits
    torch.manual_seed(5)
    assert torch.equal(ours(ids_BT).logits, first)
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(ids_BT).logits, ours(ids_BT).logits), "none in evaluation"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout, tokenizer, ids_BT):
    _, ours = tuned_pair(tokenizer, dropout=dropout)
    torch.manual_seed(3)
    stored = {name: it.clone() for name, it in gradients(ours, ids_BT).items()}
    ours.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    are_close(gradients(ours, ids_BT), stored)


def test_a_layer_called_with_another_input_is_computed_alone_from_then_on(tokenizer):
    theirs, ours = tuned_pair(tokenizer)
    x_TD, y_TD = torch.randn(3, 32), torch.randn(3, 32)
    their, our = (it.base_model.model.model.layers[0].self_attn for it in (theirs, ours))
    for name, value in (("q_proj", x_TD), ("v_proj", y_TD), ("k_proj", y_TD), ("q_proj", y_TD)):
        torch.testing.assert_close(getattr(our, name)(value), getattr(their, name)(value))
    group = our.q_proj.forward.group
    assert not group.is_together
    assert not group.waiting


def test_an_interrupted_call_leaves_nothing_to_the_next(tokenizer):
    theirs, ours = tuned_pair(tokenizer)
    their, our = (it.base_model.model.model.layers[0].self_attn for it in (theirs, ours))
    our.q_proj(torch.randn(3, 32))
    x_TD = torch.randn(3, 32)
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(getattr(our, name)(x_TD), getattr(their, name)(x_TD))
    assert our.q_proj.forward.group.is_together


def test_under_autocast_and_in_bfloat16_peft_computes(tokenizer, ids_BT, monkeypatch):
    _, ours = tuned_pair(tokenizer)
    monkeypatch.setattr(joined_lora, "_compute", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(ids_BT)
    ours.to(torch.bfloat16)
    ours(ids_BT)
    with pytest.raises(TypeError):
        ours.float()(ids_BT)


def halved(model):
    """The model with frozen weights in bfloat16, as it is loaded for training."""
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    return model


def in_bfloat16(function, *args):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return function(*args)


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "up_proj"])
def test_in_bfloat16_an_adapter_far_smaller_than_a_rounding_step_is_not_lost(name, tokenizer):
    theirs, ours = map(halved, tuned_pair(tokenizer, model_type="qwen2"))
    their, our = (
        next(it for path, it in model.named_modules() if path.endswith(f".{name}"))
        for model in (theirs, ours)
    )
    x_TD = torch.randn(2000, our.in_features)

    def share_of_adapter(layer):
        """What the adapter changes in the output, along what it should change; 1 if all of it."""
        with torch.no_grad():
            base_TF = layer.base_layer(x_TD.bfloat16()).double()
            delta_TF = (x_TD @ layer.get_delta_weight("default").T).double()
            # A step of bfloat16 is 2**-8 of the number or less.
            layer.lora_B["default"].weight.mul_(2**-13 * base_TF.norm() / delta_TF.norm())
            delta_TF = (x_TD @ layer.get_delta_weight("default").T).double()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                change_TF = layer(x_TD).double() - base_TF
        return float((change_TF * delta_TF).sum() / (delta_TF * delta_TF).sum())

    assert abs(share_of_adapter(our) - 1) < 0.2
    assert abs(share_of_adapter(their)) < 0.2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bfloat16_outputs_and_gradients_are_those_of_float32_up_to_rounding(dropout, tokenizer):
    half = halved(tuned_pair(tokenizer, dropout=dropout)[1])
    exact = deepcopy(half).float()
    x_TD, signs_TF = torch.randn(200, 32), torch.randn(200, 64)

    def outputs_and_gradients(model):
        mlp, x = model.base_model.model.model.layers[0].mlp, x_TD.clone().requires_grad_()
        torch.manual_seed(4)
        outputs = [mlp.gate_proj(x), mlp.up_proj(x)]
        sum((output * signs_TF).sum() for output in outputs).backward()
        weights = [it.grad for it in mlp.parameters() if it.grad is not None]
        return [*outputs, x.grad, *weights]

    found = in_bfloat16(outputs_and_gradients, half)
    for ours, theirs in zip(found, outputs_and_gradients(exact), strict=True):
        # Three roundings to 8 bits on the longest way.
        assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 3 * 2**-8


def test_in_bfloat16_an_adapter_of_zeros_changes_no_bit(tokenizer, ids_BT):
    _, ours = map(halved, tuned_pair(tokenizer))
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    ours.eval()
    with torch.no_grad(), ours.disable_adapter():
        base = in_bfloat16(ours, ids_BT).logits
    assert torch.equal(in_bfloat16(ours, ids_BT).logits, base)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj"]])
def test_attention_is_float32_where_all_of_its_layers_are_computed_here(
    targets, tokenizer, ids_BT, monkeypatch
):
    _, ours = map(halved, tuned_pair(tokenizer, targets=targets))
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def look(query, *args, **kwargs):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    in_bfloat16(ours, ids_BT)
    expected = (torch.float32, False) if targets == "all-linear" else (torch.bfloat16, True)
    assert set(seen) == {expected}


def test_dora_is_left_to_peft(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer, variant="dora")
    assert torch.equal(ours(ids_BT).logits, theirs(ids_BT).logits)
    assert not [it for it in ours.modules() if isinstance(it.forward, joined_lora._Member)]


def test_a_frozen_input_gets_no_gradient_and_a_trained_one_does(tokenizer):
    theirs, ours = tuned_pair(tokenizer)
    their, our = (it.base_model.model.model.layers[0].mlp for it in (theirs, ours))
    got = []
    for mlp in (their, our):
        x_TD = torch.ones(2, 32, requires_grad=True)
        checkpoint(mlp, x_TD, use_reentrant=False).sum().backward()
        got.append(x_TD.grad)
    torch.testing.assert_close(*got)
    output = our.gate_proj(torch.ones(2, 32))
    assert output.requires_grad
    our.up_proj(torch.ones(2, 32))


def test_joining_twice_changes_nothing(tokenizer):
    _, ours = tuned_pair(tokenizer)
    before = [it.forward for it in ours.modules() if isinstance(it.forward, joined_lora._Member)]
    join_lora(ours)
    after = [it.forward for it in ours.modules() if isinstance(it.forward, joined_lora._Member)]
    assert before == after
