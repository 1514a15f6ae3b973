"""LoRA layers with the same input are computed together, and give what peft gives."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.models.conftest import MODEL_TYPES, tiny_config
from yrunner.models import joined_lora
from yrunner.models.joined_lora import join_lora
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

    def draw(shape, share):
        torch.manual_seed(len(shape))  # every layer of a width drops the same places
        masks.append(torch.rand(tuple(shape)) < share)
        return masks[-1], 1 - share

    class Drop(nn.Module):
        def forward(self, x_BTD):
            torch.manual_seed(2)
            return x_BTD * (torch.rand(x_BTD.flatten(0, 1).shape) >= 0.5).view_as(x_BTD) / 0.5

    monkeypatch.setattr(joined_lora, "_draw_dropped", draw)
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
