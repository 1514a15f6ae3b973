"""A micro-batch in one row gives what its examples give alone, and no layer computes padding."""

from itertools import chain

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.conftest import MODEL_TYPES, SIZES, tiny_config
from yrunner.models.layers import example_attention
from yrunner.models.layers.example_attention import BY_EXAMPLE, attend_by_example
from yrunner.models.layers.joined_lora import IN_FLOAT32
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


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "phi3", "granite", "gemma"])
def test_a_row_of_examples_gives_their_logits_and_gradients_alone(
    model_type, in_blocks, tokenizer, monkeypatch
):
    if in_blocks:
        monkeypatch.setattr(example_attention, "_takes_blocks", lambda query: query.shape[2] > 1)
        monkeypatch.setattr(example_attention, "BLOCK", 4)
    model = model_of(model_type, tokenizer)
    examples = examples_of(model)
    alone = logits_and_gradients(model, logits_alone, examples)
    assert attend_by_example(model)
    assert model.config._attn_implementation == BY_EXAMPLE
    found = logits_and_gradients(model, logits_in_one_row, examples)
    largest = max(float(gradient.norm()) for gradient in alone[1:])
    for number, (ours, theirs) in enumerate(zip(found, alone, strict=True)):
        # Blocks round gradients to 8 bits, and those of keys nearly cancel.
        is_rounded = in_blocks and number > 0
        tolerance = 3 * 2**-8 * largest if is_rounded else 1e-5 * float(theirs.norm())
        assert float((ours - theirs).norm()) <= tolerance


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


@pytest.mark.parametrize(("length", "num_heads", "num_keys"), [(64, 2, 2), (65, 6, 2), (200, 3, 1)])
def test_blocks_give_the_outputs_and_gradients_of_the_whole_square(length, num_heads, num_keys):
    torch.manual_seed(0)
    heads = (num_heads, num_keys, num_keys)
    inputs = [torch.randn(1, length, number, 8).transpose(1, 2) for number in heads]
    signs_1THD = torch.randn(1, length, num_heads, 8)

    def results(attend, dtype):
        given = [it.to(dtype, copy=True).requires_grad_() for it in inputs]
        output = attend(*given)
        (output * signs_1THD.to(dtype)).sum().backward()
        return [output.detach(), *(it.grad for it in given)]

    def whole_square(query, key, value):
        key, value = (it.repeat_interleave(num_heads // num_keys, 1) for it in (key, value))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (0.3 * query @ key.mT).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2)

    exact = results(whole_square, torch.float64)
    ours = results(lambda *given: example_attention._in_blocks(*given, 0.3), torch.float32)
    errors = [
        float((our - their).norm() / their.norm()) for our, their in zip(ours, exact, strict=True)
    ]
    assert errors[0] < 1e-6, "the forward pass is float32"
    # Three roundings to 8 bits on the longest way.
    assert max(errors[1:]) < 3 * 2**-8


def test_only_causal_attention_in_float32_of_a_model_in_bfloat16_is_computed_in_blocks(
    tokenizer, monkeypatch
):
    monkeypatch.setattr(example_attention, "IN_BLOCKS", range(2, 1025))
    model = model_of("llama", tokenizer)
    attend_by_example(model)
    ids_1T = torch.arange(7)[None]
    blocks, seen = example_attention._in_blocks, []

    def look(*args):
        seen.append(args)
        return blocks(*args)

    monkeypatch.setattr(example_attention, "_in_blocks", look)
    model(ids_1T)
    assert not seen, "a model in float32"
    before = IN_FLOAT32.set(True)
    try:
        model(ids_1T)
        assert len(seen) == 2, "one for each layer"
        with torch.autocast("cpu", torch.bfloat16):
            model(ids_1T)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model(ids_1T)
        model.to(torch.bfloat16)(ids_1T)
    finally:
        IN_FLOAT32.reset(before)
    assert len(seen) == 2


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


def test_a_model_that_does_not_pass_positions_to_its_attention_is_left_as_it_is(qwen3):
    for layer in qwen3.model.layers:
        attend = layer.self_attn.forward

        def without_positions(*args, attend=attend, position_ids=None, **kwargs):
            return attend(*args, **kwargs)

        layer.self_attn.forward = without_positions
    assert not attend_by_example(qwen3)
    assert qwen3.config._attn_implementation == "sdpa"
