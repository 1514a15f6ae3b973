"""MLPs and norms are computed together, and give what transformers and peft give."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.models.conftest import MODEL_TYPES, tiny_config
from yrunner.models.layers import llama_layers
from yrunner.models.layers.joined_lora import join_lora
from yrunner.models.layers.llama_layers import _JoinedMlp, _ShortNorm, shorten_layers
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning


def tuned_pair(tokenizer, model_type="qwen3", *, changes=None, **tuning):
    """A model with a trained adapter: as transformers and peft compute it, and shortened."""
    torch.manual_seed(0)
    model = build_model(tiny_config(model_type, **(changes or {})), tokenizer, seed=1)
    theirs = apply_tuning(model, LoraTuning(**{"rank": 4, "dropout": 0.0, **tuning}))
    for name, weight in theirs.named_parameters():
        if "lora_B" in name or "bias" in name or "norm" in name:
            nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.1)
    ours = deepcopy(theirs)
    shorten_layers(ours)
    return theirs.train(), ours.train()


def logits_and_gradients(model, ids_BT):
    model.zero_grad()
    found = model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
    found.loss.backward()
    return {"logits": found.logits.detach()} | {
        name: it.grad for name, it in model.named_parameters() if it.requires_grad
    }


def are_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(float(it.norm()) for name, it in theirs.items() if name != "logits")
    for name, found in ours.items():
        scale = float(theirs[name].norm()) if name == "logits" else largest
        assert float((found - theirs[name]).norm()) < 1e-5 * scale, name


def patched(model, kind):
    return [it for it in model.modules() if isinstance(vars(it).get("forward"), kind)]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "granite", "mistral", "smollm3"])
def test_mlps_and_norms_of_llamas_form_give_the_same_logits_and_gradients(
    model_type, tokenizer, ids_BT
):
    theirs, ours = tuned_pair(tokenizer, model_type)
    assert len(patched(ours, _JoinedMlp)) == 2
    assert len(patched(ours, _ShortNorm)) == (9 if model_type == "qwen3" else 5)
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))


@pytest.mark.parametrize(
    ("model_type", "changes", "mlps", "norms"),
    [
        ("gemma", {}, 0, 0),  # another activation; norms that add 1
        ("olmo2", {}, 2, 0),  # multiplies by the weight before it rounds
        ("cohere", {}, 2, 0),  # layer norms
        ("phi3", {}, 0, 5),  # gate and up in one matrix
        ("llama", {"hidden_act": "gelu"}, 0, 5),
        ("llama", {"mlp_bias": True, "attention_bias": True}, 2, 5),
    ],
)
def test_other_forms_are_left_to_transformers(model_type, changes, mlps, norms, tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer, model_type, changes=changes)
    assert (len(patched(ours, _JoinedMlp)), len(patched(ours, _ShortNorm))) == (mlps, norms)
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))


def test_an_mlp_drops_what_its_layers_would_drop_one_by_one(tokenizer, ids_BT):
    layers, _ = tuned_pair(tokenizer, dropout=0.3)
    joined = deepcopy(layers)
    join_lora(layers)
    shorten_layers(joined)
    assert patched(joined, _JoinedMlp)
    found = []
    for model in (joined, layers):
        torch.manual_seed(3)
        found.append(logits_and_gradients(model, ids_BT))
    are_close(*found)
    torch.manual_seed(4)
    others = logits_and_gradients(layers, ids_BT)
    assert not torch.equal(others["logits"], found[0]["logits"]), "nothing was dropped"


def test_an_mlp_with_a_layer_without_an_adapter_is_computed_layer_by_layer(
    tokenizer, ids_BT, monkeypatch
):
    theirs, ours = tuned_pair(tokenizer, targets=["q_proj", "up_proj"])
    monkeypatch.setattr(llama_layers, "_mlp", None)
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))


def test_the_forward_pass_is_the_same_bit_for_bit_with_and_without_gradient(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer)
    with_gradient = ours(ids_BT).logits
    with torch.no_grad():
        assert torch.equal(ours(ids_BT).logits, with_gradient)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits)
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    with ours.disable_adapter():
        base = ours(ids_BT).logits
    assert torch.equal(ours(ids_BT).logits, base), "a reference is the model as the run began"


def test_gradient_checkpointing_and_a_second_adapter_change_no_gradient(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer)
    stored = {name: it.clone() for name, it in logits_and_gradients(ours, ids_BT).items()}
    ours.activation_checkpointing_enable({"use_reentrant": False})
    are_close(logits_and_gradients(ours, ids_BT), stored)
    for model in (theirs, ours):
        torch.manual_seed(7)
        model.add_adapter("second", deepcopy(model.peft_config["default"]))
        model.set_adapter("second")
        for name, weight in model.named_parameters():
            if "lora_B.second" in name:
                nn.init.normal_(weight, std=0.1)
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))


def test_a_merged_adapter_is_computed_as_part_of_the_base(tokenizer, ids_BT):
    _, ours = tuned_pair(tokenizer)
    before = ours(ids_BT).logits
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids_BT).logits, before, atol=1e-4, rtol=1e-4)


def test_without_its_adapter_a_model_is_the_base(tokenizer, ids_BT):
    theirs, ours = (model.unload() for model in tuned_pair(tokenizer))
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits)


def test_a_trained_norm_is_left_to_transformers(tokenizer, ids_BT):
    theirs, ours = tuned_pair(tokenizer)
    for model in (theirs, ours):
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad or "norm" in name)
    are_close(logits_and_gradients(ours, ids_BT), logits_and_gradients(theirs, ids_BT))


def test_in_bfloat16_gradients_are_those_of_float32_up_to_rounding(tokenizer, ids_BT):
    _, exact = tuned_pair(tokenizer)
    for weight in exact.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16().float()
    half = deepcopy(exact)
    for weight in half.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    theirs = logits_and_gradients(exact, ids_BT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logits_and_gradients(half, ids_BT)
    assert patched(half, _JoinedMlp)
    for name, found in ours.items():
        if ".mlp." in name or name == "logits":
            # Some ten roundings to 8 bits on the longest way through two layers.
            error = float((found.float() - theirs[name]).norm() / theirs[name].norm())
            assert error < 10 * 2**-8, (name, error)


@pytest.mark.parametrize("halves", ["equal", "different"])
def test_rotary_embeddings_give_the_outputs_and_gradients_of_transformers(halves):
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.randn(2, 2, 5, 8)
    if halves == "equal":
        cos, sin = (torch.cat([it[..., :4]] * 2, -1) for it in (cos, sin))
    found = []
    for rotate in (llama_layers._rotate, apply_rotary_pos_emb):
        inputs = [it.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for it in (q, k)]
        outputs = rotate(*inputs, cos, sin)
        sum((it * it.detach().cos()).sum() for it in outputs).backward()
        found.append([*outputs, *(it.grad for it in inputs)])
    torch.testing.assert_close(*found)


def test_attention_of_llamas_form_rotates_in_fewer_passes_and_another_is_left(tokenizer):
    _, ours = tuned_pair(tokenizer)
    assert [it for it in ours.modules() if _rotates(it)]
    _, others = tuned_pair(tokenizer, "phi3")  # may rotate a part of each head
    assert not [it for it in others.modules() if _rotates(it)]


def _rotates(module):
    forward = getattr(vars(module).get("forward"), "original", vars(module).get("forward"))
    known = getattr(getattr(forward, "__func__", None), "__globals__", {})
    return known.get("apply_rotary_pos_emb") is llama_layers._rotate


def test_shortening_twice_changes_nothing(tokenizer):
    _, ours = tuned_pair(tokenizer)
    before = [vars(it).get("forward") for it in ours.modules()]
    shorten_layers(ours)
    assert before == [vars(it).get("forward") for it in ours.modules()]
