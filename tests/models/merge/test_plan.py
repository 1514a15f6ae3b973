"""Base and adapters, written as one model, answer as the trained model did."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.models.conftest import logits_of, tiny_config, train_one_step
from yrunner.errors import MissingError, ModelError
from yrunner.models.load import load_model
from yrunner.models.merge.plan import BaseQuantization, WeightedAdapter, prepare_merge
from yrunner.models.merge.proof import Probes, folder_logits, logits_at, merge_logits
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.models.merge.write import changed_weights, write_merged
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model

ADAPTERS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and embeddings": {"target_modules": ["lm_head", "embed_tokens"]},
    "head as a whole": {"modules_to_save": ["lm_head"]},
    "embeddings as a whole": {"modules_to_save": ["embed_tokens"]},
    "a norm as a whole": {"modules_to_save": ["norm"]},
    "new tokens": {"trainable_token_indices": [3, 5]},
    "dora on the head": {"target_modules": ["lm_head"], "use_dora": True},
}


def tune(base, folder, ids_BT, **settings):
    """Train an adapter on a base and save it; gives the trained model."""
    settings = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | settings
    model = load_model(str(base), dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**settings))
    train_one_step(tuned, ids_BT)
    tuned.save_pretrained(folder)
    return tuned


def merge(base, adapters, folder, *, dtype=None, shard_size="5GB", **options):
    """Merge, write config and weights; gives what was merged."""
    folder.mkdir()
    prepared = prepare_merge(open_checkpoint(str(base)), adapters, **options)
    write_merged(prepared, folder, dtype=dtype, shard_size=shard_size, advance=lambda _: None)
    return prepared


def reloaded(folder, ids_BT, dtype=torch.float32):
    return logits_of(load_model(str(folder), dtype=dtype), ids_BT)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tokenizer, card, tmp_path):
    model = build_model(tiny_config("qwen3", tie_word_embeddings=request.param), tokenizer, seed=1)
    # DoRA divides by the length of each row, and that of the pad token begins as zero.
    model.get_input_embeddings().weight.data[tokenizer.pad_token_id] = 0.02
    save_model(model, tokenizer, tmp_path / "base", card)
    return tmp_path / "base"


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_merged_is_adapter_on_base(settings, base, ids_BT, tmp_path):
    tuned = tune(base, tmp_path / "adapter", ids_BT, **settings)
    merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")
    merged = reloaded(tmp_path / "merged", ids_BT)
    expected = logits_of(tuned, ids_BT)
    assert (merged - expected).abs().max() < 1e-4
    assert (expected - reloaded(base, ids_BT)).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.parametrize("kind", ["plain", "dora", "head", "new tokens"])
def test_every_model_form_is_merged(kind, base_folder, ids_BT, tmp_path):
    tuned = tune(base_folder, tmp_path / "adapter", ids_BT, **ADAPTERS[kind])
    merge(base_folder, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")
    torch.testing.assert_close(
        reloaded(tmp_path / "merged", ids_BT), logits_of(tuned, ids_BT), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}])
def test_trained_biases_are_merged(settings, tokenizer, card, ids_BT, tmp_path):
    model = build_model(tiny_config("qwen2"), tokenizer, seed=1)
    save_model(model, tokenizer, tmp_path / "base", card)
    settings |= {"target_modules": ["q_proj", "v_proj"]}
    tuned = tune(tmp_path / "base", tmp_path / "adapter", ids_BT, **settings)
    merge(tmp_path / "base", [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")
    merged = reloaded(tmp_path / "merged", ids_BT)
    torch.testing.assert_close(merged, logits_of(tuned, ids_BT), rtol=0, atol=1e-4)


def test_what_was_tied_stays_tied_unless_the_adapter_parts_it(tokenizer, card, ids_BT, tmp_path):
    model = build_model(tiny_config("qwen3", tie_word_embeddings=True), tokenizer, seed=1)
    save_model(model, tokenizer, tmp_path / "base", card)
    for kind, tied in (("plain", True), ("new tokens", True), ("head", False)):
        tune(tmp_path / "base", tmp_path / kind, ids_BT, **ADAPTERS[kind])
        merge(tmp_path / "base", [WeightedAdapter(tmp_path / kind)], tmp_path / f"merged {kind}")
        config = json.loads((tmp_path / f"merged {kind}" / "config.json").read_text())
        weights = load_file(tmp_path / f"merged {kind}" / "model.safetensors")
        assert config["tie_word_embeddings"] == tied
        assert ("lm_head.weight" in weights) == (not tied)


@pytest.mark.parametrize("more", [8, -5])
def test_a_resized_vocabulary_goes_into_the_merged_model(more, base, ids_BT, tmp_path):
    model = load_model(str(base), dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings + more
    model.resize_token_embeddings(rows, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    train_one_step(tuned, ids_BT)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    prepared = merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")
    expected = logits_of(tuned, ids_BT)
    assert expected.shape[-1] == rows
    torch.testing.assert_close(reloaded(tmp_path / "merged", ids_BT), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(reloaded(tmp_path / "adapter", ids_BT), expected, rtol=0, atol=1e-4)
    probes = Probes(ids_BT.tolist())
    streamed = merge_logits(prepared, [], probes, trust_remote_code=False)
    torch.testing.assert_close(streamed, expected[0], rtol=0, atol=1e-4)


def test_several_adapters_add_up_by_their_weights(base, ids_BT, tmp_path):
    weights = {"one": 0.7, "two": -0.4}
    tune(base, tmp_path / "one", ids_BT, target_modules=["q_proj", "up_proj"])
    tune(base, tmp_path / "two", ids_BT.flip(1), target_modules=["q_proj", "o_proj"], r=2)
    adapters = [WeightedAdapter(tmp_path / name, weight) for name, weight in weights.items()]
    prepared = merge(base, adapters, tmp_path / "merged")

    start = load_file(base / "model.safetensors")
    expected = {name: weight.clone() for name, weight in start.items()}
    for name, weight in weights.items():
        model = load_model(str(base), dtype=torch.float32)
        alone = PeftModel.from_pretrained(model, tmp_path / name).merge_and_unload()
        alone.save_pretrained(tmp_path / f"{name} alone")
        for key, value in load_file(tmp_path / f"{name} alone" / "model.safetensors").items():
            expected[key] += weight * (value - start[key])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5)
    probes = Probes(ids_BT.tolist())
    adapted = merge_logits(prepared, adapters, probes, trust_remote_code=False)
    written = folder_logits(tmp_path / "merged", probes, trust_remote_code=False)
    torch.testing.assert_close(adapted, written, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "head as a whole", "embeddings"])
def test_what_cannot_be_weighed_is_merged_alone(kind, base, ids_BT, tmp_path):
    tune(base, tmp_path / "one", ids_BT, **ADAPTERS[kind])
    tune(base, tmp_path / "two", ids_BT)
    checkpoint = open_checkpoint(str(base))
    with pytest.raises(ModelError, match=r"merged alone, with weight 1\. Remove merge"):
        prepare_merge(checkpoint, [WeightedAdapter(tmp_path / "one", 0.5)])
    with pytest.raises(ModelError, match="merged alone"):
        prepare_merge(
            checkpoint, [WeightedAdapter(tmp_path / "two"), WeightedAdapter(tmp_path / "one")]
        )


def test_files_of_any_size_hold_the_same_weights(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "one")
    merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "many", shard_size="20KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    sizes = [sum(w.nbytes for w in load_file(file).values()) for file in files]
    largest = max(w.nbytes for file in files for w in load_file(file).values())
    assert max(sizes) <= max(20_000, largest)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    one, many = (reloaded(tmp_path / name, ids_BT) for name in ("one", "many"))
    assert torch.equal(one, many)
    # And a base in many files is read as one in a single file.
    tune(tmp_path / "many", tmp_path / "next", ids_BT)
    merge(tmp_path / "many", [WeightedAdapter(tmp_path / "next")], tmp_path / "of many")
    merge(tmp_path / "one", [WeightedAdapter(tmp_path / "next")], tmp_path / "of one")
    assert torch.equal(
        reloaded(tmp_path / "of many", ids_BT), reloaded(tmp_path / "of one", ids_BT)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_chosen_and_rounded_once(dtype, base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "exact")
    merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "rounded", dtype=dtype)
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    rounded = load_file(tmp_path / "rounded" / "model.safetensors")
    assert all(torch.equal(rounded[name], weight.to(dtype)) for name, weight in exact.items())
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_half_precision_base_keeps_its_dtype_and_is_merged_exactly(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = base / "model.safetensors"
    halves = {name: weight.bfloat16() for name, weight in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    prepared = merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first, second = (
        adapter[f"base_model.model.{name.replace('.weight', '')}.lora_{part}.weight"]
        for part in "AB"
    )
    exact = halves[name].float() + second @ first * (8 / 4)
    assert merged[name].dtype == torch.bfloat16
    assert torch.equal(merged[name], exact.bfloat16())
    assert prepared.base.main_dtype() == torch.bfloat16


def test_a_weight_that_float16_cannot_hold_is_named(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = base / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 1e6)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite.*Choose bfloat16"):
        merge(
            base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged", dtype=torch.float16
        )


def test_an_adapter_that_is_not_finite_is_refused(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: torch.full_like(w, torch.nan) for n, w in load_file(path).items()}, path)
    with pytest.raises(
        ModelError, match=r"is not finite in the merged model\. Check the base, and"
    ):
        merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")


def test_a_damaged_adapter_is_refused_by_its_name(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is cut: it has"):
        merge(base, [WeightedAdapter(tmp_path / "adapter")], tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "LOHA"}, "has the type LOHA"),
        ({"init_lora_weights": "pissa"}, "was initialised by pissa, which changes the base"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication, which cannot be merged"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(change, expected, base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=expected):
        prepare_merge(open_checkpoint(str(base)), [WeightedAdapter(tmp_path / "adapter")])


def test_a_config_that_calls_plain_weights_quantized_is_refused(base, ids_BT, tmp_path):
    tune(base, tmp_path / "adapter", ids_BT)
    path = base / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    with pytest.raises(ModelError, match="says that the weights are quantized, but they are not"):
        prepare_merge(open_checkpoint(str(base)), [WeightedAdapter(tmp_path / "adapter")])


def test_streamed_logits_are_those_of_the_whole_model(base, ids_BT, tmp_path):
    tuned = tune(base, tmp_path / "adapter", ids_BT)
    adapters = [WeightedAdapter(tmp_path / "adapter")]
    prepared = merge(base, adapters, tmp_path / "merged")
    probes = Probes([*ids_BT.tolist(), ids_BT[0, :3].tolist()])
    for streamed in (
        merge_logits(prepared, adapters, probes, trust_remote_code=False),
        folder_logits(tmp_path / "merged", probes, trust_remote_code=False),
    ):
        torch.testing.assert_close(streamed, logits_at(tuned, probes), rtol=0, atol=1e-4)
        torch.testing.assert_close(streamed[-3:], streamed[:3], rtol=0, atol=1e-5)
    # Running it has changed nothing: it can be written again.
    again = changed_weights(prepared)["model.layers.0.self_attn.q_proj.weight"].make()
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(again, written["model.layers.0.self_attn.q_proj.weight"])


def test_a_mixture_of_experts_is_merged_and_compared_as_a_whole(tokenizer, card, ids_BT, tmp_path):
    config = tiny_config(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    )
    save_model(build_model(config, tokenizer, seed=1), tokenizer, tmp_path / "base", card)
    tuned = tune(tmp_path / "base", tmp_path / "adapter", ids_BT, target_modules=["q_proj"])
    adapters = [WeightedAdapter(tmp_path / "adapter")]
    prepared = merge(tmp_path / "base", adapters, tmp_path / "merged")
    assert not prepared.can_stream
    probes = Probes(ids_BT.tolist())
    expected = logits_at(tuned, probes)
    for found in (
        merge_logits(prepared, adapters, probes, trust_remote_code=False),
        folder_logits(tmp_path / "merged", probes, trust_remote_code=False),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_adapter_of_a_base_in_four_bits_is_merged_as_it_was_trained(
    double_quant, tokenizer, card, ids_BT, tmp_path
):
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Weights are quantized in blocks of 64.
    config = tiny_config("qwen3", hidden_size=64, intermediate_size=128)
    save_model(build_model(config, tokenizer, seed=1), tokenizer, tmp_path / "base", card)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bits, dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Its product in bfloat16 would be compared with ours in float32.
            module.support_avx512bf16_for_cpu = False
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings)
    train_one_step(tuned, ids_BT)
    tuned.save_pretrained(tmp_path / "adapter")
    adapters = [WeightedAdapter(tmp_path / "adapter")]
    expected = logits_of(tuned, ids_BT)
    as_trained = BaseQuantization("nf4", double_quant=double_quant)
    merge(tmp_path / "base", adapters, tmp_path / "as trained", as_trained=as_trained)
    merge(tmp_path / "base", adapters, tmp_path / "exact")
    near = (reloaded(tmp_path / "as trained", ids_BT) - expected).abs().max()
    far = (reloaded(tmp_path / "exact", ids_BT) - expected).abs().max()
    assert near < 1e-4 < far


def test_without_bitsandbytes_the_error_says_what_to_install(base, ids_BT, tmp_path, monkeypatch):
    tune(base, tmp_path / "adapter", ids_BT)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingError, match=r"pip install 'yrunner\[qlora\]'"):
        merge(
            base,
            [WeightedAdapter(tmp_path / "adapter")],
            tmp_path / "merged",
            as_trained=BaseQuantization("nf4", double_quant=True),
        )
