"""Models that keep packed examples apart pass, models that mix them are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.conftest import SIZES, tiny_config
from yrunner.errors import ModelError
from yrunner.models.limits import (
    branches_at_a_mask,
    check_causal,
    check_isolation,
    is_causal,
    isolates_examples,
    unlearned_rows,
)
from yrunner.models.scratch import build_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
ISOLATES = {
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {},
    "qwen3_moe": EXPERTS,
}
MIXES = {
    "mamba": {"state_size": 8},
    "rwkv": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 16, **LINEAR},
}


def model_of(model_type, keys, attention):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 300, "pad_token_id": 0, **keys}
    if model_type in MIXES and model_type != "qwen3_next":
        del sizes["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ISOLATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_positions_keeps_packed_examples_apart(model_type, attention, dtype):
    model = model_of(model_type, ISOLATES[model_type], attention).to(dtype)
    assert isolates_examples(model)
    check_isolation(model)


BRANCHES = {
    "qwen3": True,
    "llama": True,
    "gpt2": True,
    "qwen3_moe": True,
    # Their windows would be lost.
    "mistral": False,
    "gemma3_text": False,
    # No attention, or no positions.
    "mamba": False,
    "bloom": False,
    "qwen3_next": False,
}


@pytest.mark.parametrize(("model_type", "expected"), BRANCHES.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_given_two_answers_behind_one_prompt_if_it_obeys_their_mask(
    model_type, expected, dtype
):
    attention = "eager" if model_type in ("mamba", "bloom") else "sdpa"
    model = model_of(model_type, (ISOLATES | MIXES)[model_type], attention).to(dtype)
    assert branches_at_a_mask(model) == expected


def test_attention_that_adds_its_mask_is_not_given_one_of_truth_values():
    assert not branches_at_a_mask(model_of("qwen3", ISOLATES["qwen3"], "eager"))


def test_a_model_that_leaves_the_mask_out_computes_each_answer_with_its_prompt(qwen3):
    forward = qwen3.forward
    qwen3.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    assert not branches_at_a_mask(qwen3)


@pytest.mark.parametrize("model_type", MIXES)
def test_a_model_that_mixes_packed_examples_is_refused(model_type):
    model = model_of(model_type, MIXES[model_type], "eager")
    assert not isolates_examples(model)
    with pytest.raises(ModelError) as raised:
        check_isolation(model)
    assert str(raised.value) == (
        f"data.packing: this {model_type} model with eager attention mixes the examples of a row. "
        "Set data.packing to false, or try another model.attention"
    )


def test_a_faint_leak_is_seen_in_bfloat16(tokenizer):
    """A hundredth of one logit of each token: in another row it would drown in the rounding."""
    model = build_model(tiny_config("qwen3"), tokenizer, seed=1).to(torch.bfloat16)
    assert isolates_examples(model)
    forward = model.forward

    def leaking(input_ids, **inputs):
        output = forward(input_ids=input_ids, **inputs)
        output.logits[..., 0] *= 1 + 5e-2 * input_ids[0, 0] / 320
        return output

    model.forward = leaking
    assert not isolates_examples(model)


def test_an_adapter_under_autocast_isolates_as_its_base_does(qwen3):
    model = get_peft_model(qwen3, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_isolation(model)
    assert model.training


def test_trying_out_leaves_the_random_state_and_the_weights_alone(qwen3):
    before = torch.get_rng_state(), [it.detach().clone() for it in qwen3.parameters()]
    check_isolation(qwen3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(map(torch.equal, qwen3.parameters(), before[1]))


def test_a_model_without_positions_is_refused_and_other_faults_are_not_hidden(qwen3):
    def no_positions(input_ids, use_cache):
        return forward(input_ids=input_ids, use_cache=use_cache)

    def faulty(**inputs):
        raise TypeError("unsupported operand")

    forward = qwen3.forward
    qwen3.forward = no_positions
    assert not isolates_examples(qwen3)
    qwen3.forward = faulty
    with pytest.raises(TypeError, match="operand"):
        isolates_examples(qwen3)


ENCODERS = ["bert", "roberta", "electra", "xlm", "megatron-bert", "roformer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_sees_later_tokens_and_is_refused(model_type, dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, vocab_size=300, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with pytest.raises(ModelError, match="sees the tokens that it should predict"):
        check_causal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", [*ISOLATES, *MIXES])
def test_a_model_that_predicts_from_earlier_tokens_is_never_refused(model_type, dtype):
    model = model_of(model_type, {**ISOLATES, **MIXES}[model_type], "eager").to(dtype)
    check_causal(model.train())
    assert model.training


def test_a_decoder_made_of_an_encoder_is_causal():
    config = AutoConfig.for_model("bert", **SIZES, vocab_size=300, is_decoder=True)
    check_causal(AutoModelForCausalLM.from_config(config))


def leaking(model, *, reads_from, until):
    """The model, with logits that also depend on one token behind the first ones."""
    forward = model.forward

    def leak(input_ids, **inputs):
        output = forward(input_ids=input_ids, **inputs)
        output.logits[:, :until, 0] *= 1 + 1e-2 * input_ids[:, reads_from, None]
        return output

    model.forward = leak
    return model


@pytest.mark.parametrize(("reads_from", "until"), [(1, 1), (6, 2), (-1, 1)])
def test_a_prefix_that_is_read_both_ways_is_seen(qwen3, reads_from, until):
    assert is_causal(qwen3)
    assert not is_causal(leaking(qwen3, reads_from=reads_from, until=until))


def test_attention_that_is_told_not_to_be_causal_is_seen(tokenizer):
    model = build_model(tiny_config("qwen3"), tokenizer, seed=1)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.model._update_causal_mask = None
    forward = model.model.forward
    everything = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    model.model.forward = lambda *a, **k: forward(*a, **{**k, "attention_mask": everything})
    assert not is_causal(model)


MARK, OTHER = 7, 9
UNLEARNED = {
    "is zero": lambda weight: torch.zeros_like(weight[MARK]),
    "is the same as that of another token": lambda weight: weight[OTHER],
    "is the mean of all rows": lambda weight: weight.mean(0),
}


@pytest.mark.parametrize("why", UNLEARNED)
@pytest.mark.parametrize("part", ["embeddings", "output head"])
def test_a_row_that_was_never_learned_is_found_where_training_leaves_it(tokenizer, part, why):
    model = build_model(tiny_config("qwen3", tie_word_embeddings=False), tokenizer, seed=1)
    layer = model.get_input_embeddings() if part == "embeddings" else model.lm_head
    layer.weight.data[MARK] = UNLEARNED[why](layer.weight.data)
    model.requires_grad_(False)
    (found,) = unlearned_rows(model, [MARK], [MARK])
    assert (found.token_id, found.part, found.why) == (MARK, part, why)
    assert unlearned_rows(model, [3, 4, 5], [3, 4, 5]) == []
    name = "model.embed_tokens" if part == "embeddings" else "lm_head"
    trained = {"trainable_token_indices": {name: [MARK]}, "target_modules": ["q_proj"]}
    assert unlearned_rows(get_peft_model(model, LoraConfig(**trained)), [MARK], [MARK]) == []


def test_what_is_trained_whole_is_never_called_unlearned(tokenizer):
    qwen3 = build_model(tiny_config("qwen3", tie_word_embeddings=True), tokenizer, seed=1)
    qwen3.get_input_embeddings().weight.data[MARK] = 0
    assert unlearned_rows(qwen3.requires_grad_(True), [MARK], [MARK]) == []
    adapted = get_peft_model(qwen3, LoraConfig(target_modules=["embed_tokens"]))
    assert [row.part for row in unlearned_rows(adapted, [MARK], [MARK])] == ["output head"]
