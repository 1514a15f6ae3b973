"""A micro-batch in one row gives what its examples give alone, and no layer computes padding."""

from itertools import chain

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.conftest import MODEL_TYPES, SIZES, tiny_config
from tests.rounding import rounding
from yrunner.models.layers import example_attention
from yrunner.models.layers.example_attention import BY_EXAMPLE, attend_by_example
from yrunner.models.layers.llama_layers import shorten_layers
from yrunner.models.scratch import build_model

LENGTHS = (5, 1, 9, 2)


def model_of(model_type, tokenizer):
    return build_model(tiny_config(model_type), tokenizer, seed=1).train()


def examples_of(model):
    torch.manual_seed(0)
    return [torch.randint(model.config.vocab_size, (length,)) for length in LENGTHS]


def logits_and_gradients(model, logits_of, examples):
    model.zero_grad()
    logits_TV = logits_of(model, examples)
    signs_TV = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(3))
    (logits_TV * signs_TV).sum().backward()
    return [logits_TV.detach(), *(it.grad.clone() for it in model.parameters())]


def logits_in_one_row(model, examples):
    positions = list(chain.from_iterable(range(length) for length in LENGTHS))
    row = {"input_ids": torch.cat(examples)[None], "position_ids": torch.tensor([positions])}
    return model(**row, use_cache=False).logits[0]


def logits_alone(model, examples):
    return torch.cat([model(example[None], use_cache=False).logits[0] for example in examples])


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "phi3", "granite", "gemma"])
def test_a_row_of_examples_gives_their_logits_and_gradients_alone(model_type, tokenizer):
    model = model_of(model_type, tokenizer)
    examples = examples_of(model)
    alone = logits_and_gradients(model, logits_alone, examples)
    assert attend_by_example(model)
    assert model.config._attn_implementation == BY_EXAMPLE
    for ours, theirs in zip(
        logits_and_gradients(model, logits_in_one_row, examples), alone, strict=True
    ):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_attention_never_sees_a_mask_or_more_than_an_example(tokenizer, monkeypatch):
    model = model_of("llama", tokenizer)
    attend_by_example(model)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def look(query, key, value, attn_mask=None, **kwargs):
        seen.append((query.shape[2], attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    logits_in_one_row(model, examples_of(model))
    assert seen == [(length, None) for length in LENGTHS] * 2, "of two layers"


def test_padded_rows_packed_rows_and_a_cache_are_left_to_transformers(tokenizer, ids_BT):
    model = model_of("llama", tokenizer).eval()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :2] = 0
    packed = {"input_ids": ids_BT, "position_ids": torch.arange(ids_BT.shape[1])[None] % 3}
    packed["position_ids"] = packed["position_ids"].expand_as(ids_BT)
    calls = [{"input_ids": ids_BT}, {"input_ids": ids_BT, "attention_mask": mask_BT}, packed]

    def results():
        with torch.no_grad():
            found = [model(**call, use_cache=False).logits for call in calls]
        wanted = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = model.generate(ids_BT, attention_mask=mask_BT, **wanted)
        return [*found, ids, model.generate(ids_BT[:1], **wanted)]

    before = results()
    attend_by_example(model)
    for ours, theirs in zip(results(), before, strict=True):
        torch.testing.assert_close(ours, theirs)


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


@pytest.mark.parametrize(
    ("model_type", "keys", "attention"),
    [
        ("mistral", {"sliding_window": 8}, "sdpa"),
        ("gemma3_text", {"head_dim": 8, **WINDOWS}, "sdpa"),
        ("llama", {}, "eager"),
        ("mamba", {"state_size": 8}, "sdpa"),
        ("bloom", {}, "eager"),
    ],
)
def test_a_model_that_cannot_attend_by_example_is_left_as_it_is(model_type, keys, attention):
    sizes = {**SIZES, "vocab_size": 300, "pad_token_id": 0, **keys}
    if model_type in ("mamba", "bloom"):
        del sizes["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = attention
    assert not attend_by_example(model)
    assert model.config._attn_implementation == attention


def attention_and_gradients(attend, inputs, signs_BTHD):
    """Outputs of shape [B, T, H, D], and the gradients of queries, keys and values."""
    inputs = [it.clone().requires_grad_() for it in inputs]
    outputs = attend(*inputs)
    (outputs * signs_BTHD).sum().backward()
    return [outputs.detach(), *(it.grad for it in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 16, 256])
@pytest.mark.parametrize(
    "lengths", [[1], [23], [9, 2, 7, 23, 1, 40, 8]], ids=["a token", "alone", "several"]
)
def test_products_in_half_precision_are_attention_up_to_rounding(
    dtype, block, lengths, monkeypatch
):
    monkeypatch.setattr(example_attention, "BLOCK", block)
    torch.manual_seed(0)
    heads, scale = (6, 2, 2), 0.3
    inputs = [torch.randn(1, number, sum(lengths), 16) for number in heads]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    signs_BTHD = torch.randn(1, sum(lengths), 6, 16)

    def slow(query, key, value):
        outputs = []
        examples = (it.double().split(lengths, 2) for it in (query, key, value))
        for q, k, v in zip(*examples, strict=True):
            k, v = (it.repeat_interleave(3, 1) for it in (k, v))
            hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
            scores = (scale * q @ k.mT).masked_fill(hidden, -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(1, 2))
        return torch.cat(outputs, 1)

    def ours(*inputs):
        padding = example_attention._padding(positions, 2)
        return example_attention._half_attention(*inputs, padding, scale, dtype)

    found = attention_and_gradients(ours, inputs, signs_BTHD)
    expected = attention_and_gradients(slow, inputs, signs_BTHD)
    for it, exact in zip(found, expected, strict=True):
        # A number is a sum of products of three that are rounded: scores, weights and a factor.
        assert float((it - exact).norm()) <= rounding(float(exact.norm()), 3, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_half_precision_multiplies_in_it_and_no_other(dtype, tokenizer, monkeypatch):
    model = get_peft_model(
        model_of("llama", tokenizer).to(dtype), LoraConfig(target_modules="all-linear", r=4)
    )
    shorten_layers(model)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []
    examples = examples_of(model)

    def look(query, *args, **kwargs):
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        assert attend_by_example(model)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
        in_one_row = logits_in_one_row(model, examples)
        torch.testing.assert_close(
            in_one_row, logits_alone(model, examples), rtol=0, atol=rounding(1.0, 8, dtype)
        )
    assert set(seen) == (set() if dtype == torch.bfloat16 else {torch.float32})


def test_a_model_that_does_not_pass_positions_to_its_attention_is_left_as_it_is(qwen3):
    for layer in qwen3.model.layers:
        attend = layer.self_attn.forward

        def without_positions(*args, attend=attend, position_ids=None, **kwargs):
            return attend(*args, **kwargs)

        layer.self_attn.forward = without_positions
    assert not attend_by_example(qwen3)
    assert qwen3.config._attn_implementation == "sdpa"
