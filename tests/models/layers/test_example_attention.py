"""A micro-batch in one row gives what its examples give alone, and no layer computes padding."""

from itertools import chain

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.conftest import MODEL_TYPES, SIZES, tiny_config
from yrunner.models.layers.example_attention import BY_EXAMPLE, attend_by_example
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


def test_a_model_that_does_not_pass_positions_to_its_attention_is_left_as_it_is(qwen3):
    for layer in qwen3.model.layers:
        attend = layer.self_attn.forward

        def without_positions(*args, attend=attend, position_ids=None, **kwargs):
            return attend(*args, **kwargs)

        layer.self_attn.forward = without_positions
    assert not attend_by_example(qwen3)
    assert qwen3.config._attn_implementation == "sdpa"
