"""Exactly the weights that the recipe names are trained, and they are trained in float32."""

import pytest
import torch
from peft import PeftModel

from tests.models.conftest import logits_of, tiny_config, train_one_step
from yrunner.errors import ModelError
from yrunner.models.load import load_model
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning, count_parameters
from yrunner.recipe.schema.model import FreezeTuning, FullTuning, LoraTuning


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def dtypes(model, *, trained):
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def reload(folder, dtype=torch.float32):
    return load_model(str(folder), dtype=dtype)


def saved_adapter(base_folder, tokenizer, card, ids_BT, folder, tuning):
    tuned = apply_tuning(reload(base_folder), tuning)
    train_one_step(tuned, ids_BT)
    save_model(tuned, tokenizer, folder, card)
    return tuned


def test_full_trains_every_weight_in_float32(model):
    tuned = apply_tuning(model.to(torch.bfloat16), FullTuning(kind="full"))
    assert trained_names(tuned) == {name for name, _ in model.named_parameters()}
    assert dtypes(tuned, trained=True) == {torch.float32}


@pytest.mark.parametrize(
    ("train_top", "first_trained"), [(0.25, 3), (0.5, 2), (0.6, 1), (0.7, 1), (1.0, 0)]
)
def test_freeze_trains_the_top_layers_rounded_up_and_the_final_norm(
    train_top, first_trained, tokenizer
):
    model = build_model(tiny_config("qwen3", num_hidden_layers=4), tokenizer, seed=0)
    tuned = apply_tuning(model, FreezeTuning(kind="freeze", train_top=train_top))
    expected = {
        name
        for name, _ in model.named_parameters()
        if name == "model.norm.weight"
        or any(name.startswith(f"model.layers.{n}.") for n in range(first_trained, 4))
    }
    assert trained_names(tuned) == expected


def test_a_share_that_floating_point_rounds_up_does_not_train_a_layer_more(tokenizer):
    model = build_model(tiny_config("qwen3", num_hidden_layers=10), tokenizer, seed=0)
    tuned = apply_tuning(model, FreezeTuning(kind="freeze", train_top=0.7))
    assert not any(name.startswith("model.layers.2.") for name in trained_names(tuned))


@pytest.mark.parametrize("tied", [True, False])
def test_freeze_trains_embeddings_and_head_only_when_asked(tied, tokenizer):
    config = tiny_config("llama", tie_word_embeddings=tied)
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    without = build_model(config, tokenizer, seed=0)
    apply_tuning(without, FreezeTuning(kind="freeze"))
    assert not ends & trained_names(without)
    with_ends = build_model(config, tokenizer, seed=0).to(torch.bfloat16)
    apply_tuning(with_ends, FreezeTuning(kind="freeze", embeddings=True))
    assert ends <= trained_names(with_ends)
    same = with_ends.lm_head.weight is with_ends.model.embed_tokens.weight
    assert same == tied


def test_freeze_moves_what_it_trains_and_nothing_else_under_autocast(model, ids_BT):
    tuned = apply_tuning(model.to(torch.bfloat16), FreezeTuning(kind="freeze"))
    assert dtypes(tuned, trained=True) == {torch.float32}
    assert dtypes(tuned, trained=False) == {torch.bfloat16}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_one_step(tuned, ids_BT)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained_names(tuned)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen3_moe"])
def test_freeze_finds_the_layers_of_other_families(model_type, tokenizer):
    sizes = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2}
        if model_type == "gpt2"
        else tiny_config("qwen3", num_hidden_layers=2)
    )
    model = build_model({**sizes, "model_type": model_type}, tokenizer, seed=0)
    names = trained_names(apply_tuning(model, FreezeTuning(kind="freeze")))
    assert not any(".0." in name and ".1." not in name for name in names)
    assert any(name.endswith(("ln_f.weight", "model.norm.weight")) for name in names)


@pytest.mark.parametrize("variant", ["plain", "dora", "rslora"])
def test_lora_starts_as_the_base_and_leaves_its_weights_alone(variant, model, ids_BT):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = logits_of(model, ids_BT)
    tuned = apply_tuning(model, LoraTuning(rank=4, variant=variant))
    torch.testing.assert_close(logits_of(tuned, ids_BT), expected)
    train_one_step(tuned, ids_BT)
    assert not torch.allclose(logits_of(tuned, ids_BT), expected, atol=1e-3)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
        else:
            plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain_name])


@pytest.mark.parametrize("dropout", [0, 0.05])
def test_experts_are_refused_since_their_adapter_could_not_be_merged(dropout, tokenizer):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tiny_config("qwen3", num_hidden_layers=2) | experts | {"model_type": "qwen3_moe"}
    with pytest.raises(
        ModelError, match=r"experts of this qwen3_moe model.*targets: \[k_proj, o_p"
    ):
        apply_tuning(build_model(config, tokenizer, seed=0), LoraTuning(rank=2, dropout=dropout))
    named = LoraTuning(rank=2, dropout=dropout, targets=["q_proj"])
    assert trained_names(apply_tuning(build_model(config, tokenizer, seed=0), named))


def test_all_linear_leaves_the_head_out(model):
    tuned = apply_tuning(model, LoraTuning(rank=2))
    names = trained_names(tuned)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_targets_alone_get_an_adapter(model):
    tuned = apply_tuning(model, LoraTuning(rank=2, targets=["q_proj", "v_proj"]))
    assert all(".q_proj." in name or ".v_proj." in name for name in trained_names(tuned))
    assert count_parameters(tuned)[0] == 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_lora_weights_are_float32_on_a_bfloat16_base(model, ids_BT):
    tuned = apply_tuning(model.to(torch.bfloat16), LoraTuning(rank=2, variant="dora"))
    assert dtypes(tuned, trained=True) == {torch.float32}
    assert dtypes(tuned, trained=False) == {torch.bfloat16}
    train_one_step(tuned, ids_BT)


def test_dora_and_rslora_differ_from_plain_lora(tokenizer, ids_BT):
    results = {}
    for variant in ("plain", "dora", "rslora"):
        torch.manual_seed(0)
        model = build_model(tiny_config("qwen3"), tokenizer, seed=1)
        tuned = apply_tuning(model, LoraTuning(rank=4, alpha=8, dropout=0, variant=variant))
        train_one_step(tuned, ids_BT)
        results[variant] = logits_of(tuned, ids_BT)
        layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == (8 / 4**0.5 if variant == "rslora" else 8 / 4)
        assert ("default" in layer.lora_magnitude_vector) == (variant == "dora")
    assert not torch.allclose(results["plain"], results["dora"], atol=1e-4)
    assert not torch.allclose(results["plain"], results["rslora"], atol=1e-4)


def test_the_callers_seed_decides_the_start_of_an_adapter(tokenizer):
    def start(seed):
        torch.manual_seed(seed)
        tuned = apply_tuning(build_model(tiny_config("qwen3"), tokenizer, seed=1), LoraTuning())
        return torch.cat([p.flatten() for p in tuned.parameters() if p.requires_grad])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


@pytest.mark.parametrize("tuning", [LoraTuning(rank=2, dropout=0), FreezeTuning(kind="freeze")])
def test_gradient_checkpointing_changes_no_gradient(tuning, tokenizer, ids_BT):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tuned = apply_tuning(build_model(tiny_config("qwen3"), tokenizer, seed=1), tuning)
        if checkpointing:
            tuned.activation_checkpointing_enable()
        tuned.train()
        tuned(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are(model):
    with pytest.raises(ModelError) as refused:
        apply_tuning(model, LoraTuning(targets=["q_proj", "gate_prj"]))
    message = str(refused.value)
    assert 'no linear layer of this model is called "gate_prj"' in message
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head" in message
    assert 'Did you mean "gate_proj"?' in message
    with pytest.raises(ModelError, match='called "self_attn"'):
        apply_tuning(model, LoraTuning(targets=["self_attn"]))
    with pytest.raises(ModelError, match=r"targets is empty"):
        apply_tuning(model, LoraTuning(targets=[]))


@pytest.mark.parametrize("variant", ["plain", "dora", "rslora"])
def test_going_on_with_an_adapter_starts_at_its_function_and_trains_it(
    variant, base_folder, tokenizer, card, ids_BT, tmp_path
):
    first = saved_adapter(
        base_folder,
        tokenizer,
        card,
        ids_BT,
        tmp_path / "adapter",
        LoraTuning(rank=4, variant=variant),
    )
    tuned = apply_tuning(reload(base_folder), LoraTuning(adapter=str(tmp_path / "adapter")))
    assert isinstance(tuned, PeftModel)
    torch.testing.assert_close(logits_of(tuned, ids_BT), logits_of(first, ids_BT))
    assert trained_names(tuned) == trained_names(first)
    train_one_step(tuned, ids_BT)
    assert not torch.allclose(logits_of(tuned, ids_BT), logits_of(first, ids_BT), atol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_an_adapter_of_another_base_is_refused(
    changes, qwen3_folder, tokenizer, card, ids_BT, tmp_path
):
    tuning = LoraTuning(rank=2, targets=["gate_proj"])
    saved_adapter(qwen3_folder, tokenizer, card, ids_BT, tmp_path / "adapter", tuning)
    other = build_model(tiny_config("qwen3", **changes), tokenizer, seed=0)
    with pytest.raises(ModelError, match="does not fit this base"):
        apply_tuning(other, LoraTuning(adapter=str(tmp_path / "adapter")))


def test_a_folder_without_adapter_is_refused(qwen3, qwen3_folder):
    with pytest.raises(ModelError, match="holds no adapter"):
        apply_tuning(qwen3, LoraTuning(adapter=str(qwen3_folder)))


def test_a_new_adapter_on_an_adapter_is_refused(qwen3_folder, tokenizer, card, ids_BT, tmp_path):
    saved_adapter(qwen3_folder, tokenizer, card, ids_BT, tmp_path / "adapter", LoraTuning(rank=2))
    with pytest.raises(
        ModelError, match=r"is itself an adapter \(it has adapter_config.json\).*set tuning.adapter"
    ):
        apply_tuning(reload(tmp_path / "adapter"), LoraTuning())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_counted_once(tied, tokenizer):
    model = build_model(tiny_config("llama", tie_word_embeddings=tied), tokenizer, seed=0)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    expected = 2 * layer + 32 + (1 if tied else 2) * len(tokenizer) * 32
    assert count_parameters(apply_tuning(model, FullTuning(kind="full"))) == (expected, expected)
    assert count_parameters(model.requires_grad_(False)) == (0, expected)


def test_a_rank_above_the_size_of_the_layers_is_refused(qwen3):
    apply_tuning(qwen3, LoraTuning(kind="lora", rank=32))
    with pytest.raises(ModelError, match=r"tuning\.rank 33 exceeds the model's hidden size of 32"):
        apply_tuning(qwen3, LoraTuning(kind="lora", rank=33))
