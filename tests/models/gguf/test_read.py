"""A GGUF file becomes a model folder that answers as the file says, or is refused by name."""

import shutil

import pytest
import torch
from transformers import AutoConfig

from tests.models.conftest import logits_of, tiny_config
from tests.models.gguf.test_write import ARCHITECTURES, LLAMA3_ROPE, YARN, write
from yrunner.errors import ModelError
from yrunner.models.gguf.read import (
    open_gguf,
    read_gguf,
    read_gguf_config,
    unpack,
    unpacked_folder,
)
from yrunner.models.gguf.write import write_gguf
from yrunner.models.load import load_model, load_tokenizer
from yrunner.models.local import find_gguf, read_origin
from yrunner.models.merge.safetensors_io import open_checkpoint

LLAMA_32_ROPE = LLAMA3_ROPE | {
    "rope_theta": 500000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SCALED = {
    "linear": tiny_config("llama", rope_parameters=LINEAR),
    "yarn": tiny_config("qwen2", rope_parameters=YARN),
    "yarn with its own scale": tiny_config(
        "qwen3", rope_parameters=YARN | {"attention_factor": 1.5}
    ),
    "yarn with two slopes": tiny_config(
        "llama", rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}
    ),
}
"""Configs by what scales rope."""
SCALED_OTHERWISE = tiny_config("qwen3", rope_parameters=YARN)
FORMS = (
    ARCHITECTURES
    | SCALED
    | {
        "untied": tiny_config("qwen3", tie_word_embeddings=False),
        "llama 3": tiny_config("llama", rope_parameters=LLAMA_32_ROPE),
        "with biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    }
)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_every_form_that_is_written_is_unpacked_to_the_same_weights(
    config, tokenizer, card, ids_BT, tmp_path
):
    file = write(tmp_path / "model", config, tokenizer, card)
    folder = unpacked_folder(file, tmp_path / "bases", torch.float32)
    expected = logits_of(load_model(str(tmp_path / "model"), dtype=torch.float32), ids_BT)
    found = logits_of(load_model(str(folder), dtype=torch.float32), ids_BT)
    # The same weights; only the rope's frequencies may round differently.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Experts too have the names of published folders.
    written, unpacked = (open_checkpoint(str(each)).sizes for each in (tmp_path / "model", folder))
    assert {name: size.shape for name, size in unpacked.items()} == {
        name: size.shape for name, size in written.items()
    }


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q4_1", "q4_0"])
def test_quantized_weights_are_those_that_transformers_reads(
    kind, tokenizer, card, ids_BT, tmp_path
):
    file = write(tmp_path / "model", tiny_config("llama"), tokenizer, card, kind=kind)
    folder = unpacked_folder(file, tmp_path / "bases", torch.float32)
    other = read_gguf(file, AutoConfig.from_pretrained(tmp_path / "model"))
    found = load_model(str(folder), dtype=torch.float32)
    for name, weight in other.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_the_folder_has_the_dtype_the_tokenizer_and_the_origin(tokenizer, card, tmp_path):
    file = write(tmp_path / "model", tiny_config("qwen3"), tokenizer, card, kind="q8_0")
    folder = unpacked_folder(file, tmp_path / "bases", torch.bfloat16)
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert {weight.dtype for weight in load_model(str(folder), dtype=torch.bfloat16).parameters()} \
        == {torch.bfloat16}  # fmt: skip
    loaded = load_tokenizer(str(folder))
    text = "第十二条 1873 <|im_start|> it's"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    origin = read_origin(folder)
    assert (origin["file"], origin["architecture"], origin["dtype"]) == (
        "model.gguf", "qwen3", "bfloat16"
    )  # fmt: skip
    assert len(origin["sha256"]) == 64
    assert origin["types"]["Q8_0"] > 0


def test_a_file_is_unpacked_once_and_again_when_it_changes(tokenizer, card, tmp_path, capfd):
    file = write(tmp_path / "a", tiny_config("qwen3"), tokenizer, card)
    first = unpacked_folder(file, tmp_path / "bases", torch.float32)
    assert "unpacked model.gguf (qwen3, F32) as float32 to" in capfd.readouterr().out
    assert unpacked_folder(file, tmp_path / "bases", torch.float32) == first
    assert "unpacked" not in capfd.readouterr().out
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a", tiny_config("qwen3"), tokenizer, card, seed=2)
    assert unpacked_folder(file, tmp_path / "bases", torch.float32) != first
    assert sorted(path.name for path in (tmp_path / "bases").iterdir()) == sorted(
        {first.name, unpacked_folder(file, tmp_path / "bases", torch.float32).name}
    )


def test_a_failure_leaves_no_folder(tokenizer, card, tmp_path, monkeypatch):
    file = write(tmp_path / "model", tiny_config("qwen3"), tokenizer, card)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("yrunner.models.gguf.read.write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        unpacked_folder(file, tmp_path / "bases", torch.float32)
    assert list((tmp_path / "bases").iterdir()) == []


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.99])
def test_a_file_that_was_cut_short_is_refused(share, tokenizer, card, tmp_path):
    file = write(tmp_path / "model", tiny_config("qwen3"), tokenizer, card)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"model\.gguf is (damaged or cut short|not a GGUF file)"):
        unpacked_folder(file, tmp_path / "bases", torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<html>", "is not a GGUF file"),
        (b"", "is not a GGUF file"),
        (b"GGUF" + b"\xff" * 40, "is damaged or cut short"),
    ],
)
def test_another_file_is_refused(content, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_gguf(tmp_path / "x.gguf")


def changed(file, **changes):
    """The file with other metadata; a name without a dot is one of its architecture."""
    fields = dict(file.fields)
    for key, value in changes.items():
        fields[key.replace("__", ".")] = value
    return type(file)(file.path, fields, file.tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "falcon"}, "holds a falcon model; GGUF bases can be gemma2, ge"),
        ({"llama__expert_count": 8}, "a llama with experts model"),
        ({"general__type": "adapter"}, "holds a GGUF adapter, not a model"),
        ({"split__count": 3}, "is one of 3 parts"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling of the type longrope"),
        ({"llama__rope__scaling__attn_factor": 1.2}, "attn_factor without YaRN"),
        ({"llama__rope__dimension_count": 4}, "has heads of unequal parts"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes, message, tokenizer, card, tmp_path):
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    read_gguf_config(file)
    with pytest.raises(ModelError, match=message):
        read_gguf_config(changed(file, **changes))


def test_yarn_of_other_converters_is_read_with_all_its_settings(tokenizer, card, tmp_path):
    file = open_gguf(write(tmp_path / "model", SCALED["yarn"], tokenizer, card))
    own = {"qwen2.rope.scaling.yarn_beta_fast": 16.0, "qwen2.rope.scaling.yarn_attn_factor": 1.25}
    rope = read_gguf_config(changed(file, **own)).rope_parameters
    assert (rope["beta_fast"], rope["attention_factor"]) == (16.0, 1.25)
    assert rope["original_max_position_embeddings"] == 64
    for key in ("yarn_ext_factor", "yarn_log_multiplier"):
        with pytest.raises(ModelError, match=rf"has rope\.scaling\.{key} 0\.5"):
            read_gguf_config(changed(file, **{f"qwen2.rope.scaling.{key}": 0.5}))


def test_the_proof_sees_a_scale_of_rope_that_is_missing(tokenizer, card, tmp_path, ids_BT):
    scaled = SCALED["yarn with its own scale"]
    file = write(tmp_path / "model", scaled, tokenizer, card)
    expected = load_model(str(tmp_path / "model"), dtype=torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    found = logits_of(read_gguf(file, config), ids_BT)
    torch.testing.assert_close(found, logits_of(expected, ids_BT), rtol=0, atol=1e-5)
    write_gguf(
        open_checkpoint(str(tmp_path / "model")), AutoConfig.for_model(**SCALED_OTHERWISE),
        tokenizer, file, kind="f32", name="other", advance=lambda _: None,
    )  # fmt: skip
    found = logits_of(read_gguf(file, config), ids_BT)
    assert (found - logits_of(expected, ids_BT)).abs().max() > 1e-3


def test_other_rope_factors_than_llama_3s_are_refused(tokenizer, card, tmp_path):
    config = tiny_config("llama", rope_parameters=LLAMA_32_ROPE | {"low_freq_factor": 2.0})
    file = open_gguf(write(tmp_path / "model", config, tokenizer, card))
    with pytest.raises(ModelError, match="rope factors that are not those of Llama 3"):
        read_gguf_config(file)


def test_missing_and_foreign_weights_are_refused(tokenizer, card, tmp_path):
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    norm = file.tensors["output_norm.weight"]
    without = {name: each for name, each in file.tensors.items() if each is not norm}
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"lacks the weight output_norm\.weight"):
        unpack(type(file)(file.path, file.fields, without), tmp_path / "out", torch.float32, print)
    more = {**file.tensors, "blk.0.attn_sinks.weight": norm}
    with pytest.raises(ModelError, match=r"has 1 weight that .* such as blk\.0\.attn_sinks"):
        unpack(type(file)(file.path, file.fields, more), tmp_path / "out", torch.float32, print)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor a GGUF file"):
        find_gguf(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj-a.gguf").write_bytes(b"GGUF")
    assert find_gguf(str(tmp_path)) == find_gguf(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"has 2 GGUF files \(a.gguf, b.gguf\)"):
        find_gguf(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(str(tmp_path)) is None
    assert find_gguf("Qwen/Qwen3-0.6B") is None


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file \./x\.gguf") as caught:
        find_gguf("./x.gguf")
    assert caught.value.remedy == "check the path"


@pytest.mark.parametrize(("place", "folder"), [("models/", "models"), ("./", "."), ("", ".")])
def test_a_model_that_is_not_fetched_yet_names_the_command(place, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        find_gguf(f"{place}SmolLM2-135M-Instruct.Q4_1.gguf")
    assert caught.value.remedy == f"run yrun fetch {folder}"
