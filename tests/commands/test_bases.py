"""A base that is quantized, that is no causal model, or that lacks a mark: all commands agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from tests.conftest import write_jsonl
from tests.models.conftest import logits_of
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import untrained_model
from yrunner.commands.check.command import check
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.inspect.command import inspect
from yrunner.commands.merge.command import merge
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train, train_base
from yrunner.errors import ModelError, RecipeError
from yrunner.models.adapters import attach_adapter
from yrunner.models.load import load_model
from yrunner.models.quantization import quantization_config
from yrunner.models.scratch import build_model
from yrunner.storage.run_dir import read_json

RECIPE = Path("tuned.yaml")
WIDE = {
    "model_type": "qwen3",
    "hidden_size": 64,  # weights are quantized in blocks of 64
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MARKS = ["<|im_start|>", "<|im_end|>"]
COMMANDS = {
    "check": lambda: check(RECIPE, [], as_machine=False, sample=0),
    "train": lambda: train(RECIPE, [], resume=False, overwrite=True),
    "sort": lambda: sort(RECIPE, [], overwrite=True, train_base=train_base),
    "eval": lambda: eval_recipe(RECIPE, [], []),
    "merge": lambda: merge(RECIPE, []),
    "inspect": lambda: inspect(RECIPE, [], number=1, row=None),
}


def refusals(*commands: str) -> set[str]:
    """What the commands say."""
    said = set()
    for name in commands or COMMANDS:
        with pytest.raises(ModelError) as raised:
            COMMANDS[name]()
        said.add(str(raised.value))
    return said


@pytest.fixture
def save_base(project: Path, change: Any, capitals_tokenizer: Any) -> Any:
    """Save a model as the base of tuned.yaml, which then trains a few updates."""
    change("tuned.yaml", model={"base": "base"}, train={"max_steps": 4, "learning_rate": 1e-2})

    def save(model: Any) -> Path:
        model.save_pretrained(project / "base")
        capitals_tokenizer.save_pretrained(project / "base")
        return project / "base"

    return save


@pytest.fixture
def quantize(save_base: Any, capitals_tokenizer: Any) -> Any:
    def quantize(quant_type: Any, *, tied: bool = True, double_quant: bool = False) -> Path:
        save_base(build_model({**WIDE, "tie_word_embeddings": tied}, capitals_tokenizer, 0))
        settings = quantization_config(quant_type, double_quant=double_quant, dtype=torch.float32)
        return save_base(load_model("base", dtype=torch.float32, quantization=settings))

    return quantize


@pytest.mark.parametrize(
    ("quant_type", "kind", "tied"),
    [("nf4", "qlora", True), ("fp4", "lora", False), ("int8", "qlora", False)],
)
def test_a_quantized_base_is_trained_evaluated_and_merged(quantize, change, quant_type, kind, tied):
    quantize(quant_type, tied=tied, double_quant=quant_type == "nf4")
    targets = "all-linear" if tied else ["q_proj", "down_proj", "lm_head"]
    change("tuned.yaml", tuning={"kind": kind, "rank": 4, "targets": targets})
    change("tuned.yaml", merge={"gguf": "f32"})
    for command in COMMANDS.values():
        command()
    run = Run.load(RECIPE)
    assert read_json(run.folder.merge_figures)["proof"]["largest_difference"] < 1e-5
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])
    merged = logits_of(run.load_model(run.folder.merged), ids_BT)
    torch.testing.assert_close(logits_of(run.load_result(), ids_BT), merged, rtol=0, atol=1e-5)
    # In 8 bits a forward pass rounds its inputs too.
    tuned = attach_adapter(run.load_base(), run.folder.model, trainable=False)
    atol = 0.1 if quant_type == "int8" else 1e-5
    torch.testing.assert_close(logits_of(tuned, ids_BT), merged, rtol=0, atol=atol)


METHODS = {
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "FP8": {"quantization_config": {"quant_method": "fp8"}},
    "HQQ": {"quantization_config": {"quant_method": "hqq"}},
    "EETQ": {"quantization_config": {"quant_method": "eetq"}},
    "MXFP4": {"quantization_config": {"quant_method": "mxfp4"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}},
    "bitnet": {"text_config": {"quantization_config": {"quant_method": "bitnet"}}},
}


@pytest.mark.parametrize("method", METHODS)
def test_any_other_quantization_is_refused_alike_before_anything_loads(
    save_base, capitals_tokenizer, method
):
    folder = save_base(build_model(WIDE, capitals_tokenizer, 0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | METHODS[method]))
    (folder / "README.md").write_text("---\nbase_model: maker/original\n---\n")
    (folder / "model.safetensors").write_bytes(b"never read")
    assert refusals() == {
        f"the base {folder} is quantized with {method}, which cannot be trained, scored or merged. "
        "Use the unquantized model, maker/original"
    }


def test_a_file_of_an_older_tool_says_that_a_base_is_quantized(save_base, capitals_tokenizer):
    folder = save_base(build_model(WIDE, capitals_tokenizer, 0))
    (folder / "quantize_config.json").write_text("{}")
    (said,) = refusals()
    assert "is quantized with GPTQ" in said


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tuning": {"kind": "full"}}, "tuning.kind full cannot train"),
        ({"tuning": {"kind": "freeze"}}, "tuning.kind freeze cannot train"),
        ({"tuning": {"kind": "qlora", "quant_type": "fp4"}}, "quant_type is fp4, but the base"),
        ({"merge": {"as_trained": {}}, "tuning": {"kind": "lora"}}, "Remove merge.as_trained"),
    ],
)
def test_what_does_not_suit_a_quantized_base_is_refused_alike(quantize, change, keys, expected):
    quantize("nf4")
    change("tuned.yaml", **keys)
    (said,) = refusals()
    assert expected in said


def test_an_encoder_is_refused_by_whatever_trains_or_scores(save_base, capitals_tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(capitals_tokenizer), num_hidden_layers=2, **sizes)
    save_base(BertLMHeadModel(config))
    (said,) = refusals("check", "train", "sort")
    assert "sees the tokens that it should predict" in said


TARGETS = [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]]


KEEPS = [{"kind": "ewc"}, {"kind": "rows", "file": "test.jsonl"}, {"kind": "ewc"}]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("targets", "keep"), zip(TARGETS, KEEPS, strict=True))
def test_an_adapter_on_embeddings_or_head_is_checked_trained_and_merged(
    save_base, change, capitals_tokenizer, targets, tied, keep
):
    save_base(build_model({**WIDE, "tie_word_embeddings": tied}, capitals_tokenizer, 0))
    variant = "plain" if "lm_head" in targets else "dora"
    change("tuned.yaml", tuning={"kind": "lora", "targets": targets, "variant": variant})
    if keep["kind"] == "rows":
        change("tuned.yaml", keep={**keep, "share": 0.25})
    for name in ("check", "train", "merge", "eval"):
        COMMANDS[name]()
    run = Run.load(RECIPE)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])
    tuned = attach_adapter(run.load_base(), run.folder.model, trainable=False)
    for other in (run.load_result(), run.load_model(run.folder.merged)):
        torch.testing.assert_close(
            logits_of(tuned, ids_BT), logits_of(other, ids_BT), rtol=0, atol=1e-4
        )


def test_dora_on_a_row_of_zeros_is_refused_before_its_loss_is_nan(
    save_base, change, capitals_tokenizer
):
    save_base(build_model({**WIDE, "tie_word_embeddings": True}, capitals_tokenizer, 0))
    change("tuned.yaml", tuning={"kind": "lora", "targets": ["lm_head"], "variant": "dora"})
    (said,) = refusals("check", "train")
    assert said.startswith("tuning.variant dora divides by the length of each row of lm_head")


@pytest.mark.parametrize("tied", [True, False])
def test_a_mark_that_was_never_learned_is_found_and_can_be_trained(
    save_base, change, capitals_tokenizer, capsys, tied
):
    folder = save_base(build_model({**WIDE, "tie_word_embeddings": tied}, capitals_tokenizer, 0))
    weights = load_file(folder / "model.safetensors")
    ids = capitals_tokenizer.convert_tokens_to_ids(MARKS)
    for name in {"lm_head.weight", "model.embed_tokens.weight"} & weights.keys():
        weights[name][ids] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("check", "train"):
        COMMANDS[name]()
        said = capsys.readouterr().err
        assert "the base has never learned some marks of these conversations" in said
        assert "<|im_end|> (id 2): its row in the embeddings is zero and its row in the out" in said
        assert 'Set tuning.train_tokens to ["<|im_start|>", "<|im_end|>"]' in said
    change("tuned.yaml", tuning={"kind": "lora", "train_tokens": MARKS})
    for name in ("check", "train", "merge"):
        COMMANDS[name]()
        assert "never learned" not in capsys.readouterr().err
    run = Run.load(RECIPE)
    assert all(run.load_result().get_output_embeddings().weight[ids].norm(dim=1) > 0)
    merged = load_file(run.folder.merged / "model.safetensors")["model.embed_tokens.weight"]
    assert all(merged[ids].norm(dim=1) > 0)


def test_tokens_to_train_are_tokens(save_base, change, capitals_tokenizer):
    save_base(build_model(WIDE, capitals_tokenizer, 0))
    change("tuned.yaml", tuning={"kind": "lora", "train_tokens": ["<|nothing|>"]})
    (said,) = refusals("check", "train")
    assert said.startswith('tuning.train_tokens: "<|nothing|>" is not a token of the tokenizer')


def test_a_head_that_only_the_config_ties_gets_its_own_trained_rows(
    save_base, change, capitals_tokenizer
):
    model = build_model({**WIDE, "tie_word_embeddings": True}, capitals_tokenizer, 0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_base(model)
    change("tuned.yaml", tuning={"kind": "lora", "train_tokens": MARKS})
    run = Run.load(RECIPE)
    before = logits_of(run.load_base(), torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(logits_of(untrained_model(run), torch.tensor([[1, 2, 3]])), before)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("Qwen3ForSequenceClassification", None),
        ("Qwen3ForTokenClassification", None),
        ("BertForMaskedLM", None),
        ("Qwen3ForCausalLM", "modules.json"),
    ],
)
def test_a_model_of_another_purpose_is_refused_alike(save_base, capitals_tokenizer, kind, file):
    folder = save_base(build_model(WIDE, capitals_tokenizer, 0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    if file is not None:
        (folder / file).write_text("[]")
    what = f"a {kind}" if file is None else "an embedding model"
    assert refusals() == {
        f"the base {folder} is {what}, which does not predict the next token. "
        "Use the language model that it was made from"
    }


def test_rows_of_tokens_are_not_trained_under_zero_3(project, change):
    change("tuned.yaml", tuning={"kind": "lora", "train_tokens": MARKS})
    change("tuned.yaml", distributed={"deepspeed": {"stage": 3}})
    with pytest.raises(RecipeError, match="train_tokens needs whole embeddings"):
        Run.load(RECIPE)


def test_a_base_with_new_tokens_and_a_longer_rope_is_trained_merged_and_evaluated(
    save_base, project, change, capitals_tokenizer
):
    save_base(build_model(WIDE, capitals_tokenizer, seed=1))
    change(
        "tuned.yaml",
        model__new_tokens=["<town>"],
        model__rope={"kind": "yarn", "factor": 4.0},
        tuning__train_tokens=["<town>"],
    )
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text("utf-8").splitlines()]
    marked = [{**row, "output": f"<town>{row['output']}"} for row in rows]
    write_jsonl(project / "train.jsonl", marked)
    train(RECIPE, [], resume=False, overwrite=True)
    run = Run.load(RECIPE)
    (token,) = run.tokenizer.convert_tokens_to_ids(["<town>"])
    (base,) = (project / "outputs" / ".bases").glob("base-*")
    before = load_model(str(base), dtype=torch.float32).get_input_embeddings().weight[token]
    merge(RECIPE, [])
    merged = load_model("outputs/tuned/merged", dtype=torch.float32)
    assert not torch.equal(merged.get_input_embeddings().weight[token], before), "it was trained"
    assert merged.config.rope_parameters["rope_type"] == "yarn"
    assert merged.config.max_position_embeddings == 1024
    eval_recipe(RECIPE, [], [])
