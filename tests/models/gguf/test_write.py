"""A GGUF file holds the model: read back it answers alike, token for token."""

import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.conftest import logits_of, tiny_config
from yrunner.errors import ModelError
from yrunner.models.gguf.architectures import check_supported
from yrunner.models.gguf.read import open_gguf, read_gguf
from yrunner.models.gguf.tokenizer import check_tokenizer, read_tokenizer
from yrunner.models.gguf.write import write_gguf
from yrunner.models.load import load_model, load_tokenizer
from yrunner.models.merge.proof import compare
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2],
    "long_factor": [1.5, 3.0],
    "original_max_position_embeddings": 256,
}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
ARCHITECTURES = {
    "qwen3": tiny_config("qwen3", head_dim=16),
    "qwen2": tiny_config("qwen2"),
    "llama": tiny_config("llama"),
    "mistral": tiny_config("mistral"),
    "qwen3 moe": tiny_config("qwen3_moe", head_dim=8, **EXPERTS),
    "gemma 2": tiny_config("gemma2", **GEMMA),
    # The sixth layer sees beyond the window, and has another rope.
    "gemma 3": tiny_config("gemma3_text", **GEMMA | {"num_hidden_layers": 6}),
    "gemma 3, stretched": tiny_config(
        "gemma3_text", **GEMMA | {"num_hidden_layers": 6}, rope_parameters=STRETCHED
    ),
    "phi 3": tiny_config("phi3"),
    "phi 4": tiny_config("phi3", max_position_embeddings=512, rope_parameters=LONGROPE),
    "glm 4": tiny_config("glm4", head_dim=8),
    # The fourth layer has no rope.
    "smollm 3": tiny_config("smollm3", num_hidden_layers=4),
}
"""One of every architecture, and of every variant that is written differently."""
TEXTS = ["第十二条 雾港的灯塔由市政厅管理。", "Who keeps it,  since 1873?\n\n<|im_end|> a"]


def write(folder, config, tokenizer, card, *, kind="f32", seed=1):
    """A model of this config as folder and as GGUF file; no two of its weights are alike."""
    model = build_model(config, tokenizer, seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    save_model(model, tokenizer, folder, card)
    file = folder.parent / "model.gguf"
    write_gguf(
        open_checkpoint(str(folder)),
        AutoConfig.from_pretrained(folder),
        tokenizer,
        file,
        kind=kind,
        name="tiny",
        advance=lambda _: None,
    )
    return file


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def form(request):
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_every_form_answers_alike_when_it_is_read_back(
    form, tied, tokenizer, card, ids_BT, tmp_path
):
    if form["model_type"] == "gemma2" and not tied:
        pytest.skip("llama.cpp's Gemma 2 has no head apart from its embeddings")
    config = form | {"tie_word_embeddings": tied}
    file = write(tmp_path / "model", config, tokenizer, card)
    read = read_gguf(file, AutoConfig.from_pretrained(tmp_path / "model"))
    expected = logits_of(load_model(str(tmp_path / "model"), dtype=torch.float32), ids_BT)
    torch.testing.assert_close(logits_of(read, ids_BT), expected, rtol=0, atol=1e-5)


def test_experts_are_written_alike_from_one_tensor_of_a_layer(tokenizer, card, tmp_path):
    file = write(tmp_path / "model", ARCHITECTURES["qwen3 moe"], tokenizer, card)
    whole = shutil.copytree(tmp_path / "model", tmp_path / "whole")
    # As transformers has them in memory.
    model = load_model(str(tmp_path / "model"), dtype=torch.float32)
    save_file(model.state_dict(), whole / "model.safetensors", {"format": "pt"})
    assert any(name.endswith("experts.gate_up_proj") for name in open_checkpoint(str(whole)).sizes)
    write_gguf(
        open_checkpoint(str(whole)), AutoConfig.from_pretrained(whole), tokenizer,
        tmp_path / "whole.gguf", kind="f32", name="tiny", advance=lambda _: None,
    )  # fmt: skip
    apart, together = open_gguf(file).tensors, open_gguf(tmp_path / "whole.gguf").tensors
    assert apart.keys() == together.keys()
    for name, tensor in apart.items():
        assert (tensor.data == together[name].data).all(), name


@pytest.mark.parametrize(
    ("kind", "largest_kl"),
    [("f16", 1e-6), ("bf16", 1e-4), ("q8_0", 1e-3), ("q5_1", 0.02), ("q5_0", 0.02), ("q4_1", 0.1),
     ("q4_0", 0.1)],
)  # fmt: skip
def test_fewer_bits_answer_less_alike(kind, largest_kl, tokenizer, card, ids_BT, tmp_path):
    file = write(tmp_path / "model", tiny_config("qwen3"), tokenizer, card, kind=kind)
    read = read_gguf(file, AutoConfig.from_pretrained(tmp_path / "model"))
    expected = logits_of(load_model(str(tmp_path / "model"), dtype=torch.float32), ids_BT)
    likeness = compare(expected[0], logits_of(read, ids_BT)[0])
    assert 0 < likeness.mean_kl < largest_kl


def test_the_tokenizer_and_its_template_are_in_the_file(form, tokenizer, card, tmp_path):
    file = write(tmp_path / "model", form, tokenizer, card)
    read = read_tokenizer(open_gguf(file).fields, "model.gguf")
    for text in TEXTS:
        assert read(text).input_ids == tokenizer(text).input_ids
    assert read.chat_template == tokenizer.chat_template
    assert (read.eos_token, read.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_the_file_says_what_llama_cpp_needs_to_know(tokenizer, card, tmp_path):
    rope = LLAMA3_ROPE | {"rope_theta": 5000.0}
    config = tiny_config("llama", rope_parameters=rope, rms_norm_eps=1e-5)
    reader = gguf.GGUFReader(write(tmp_path / "model", config, tokenizer, card))
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }
    found = {key: reader.get_field(key).contents() for key in expected}
    assert found == expected
    factors = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight").data
    loaded = AutoConfig.from_pretrained(tmp_path / "model")
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](loaded, "cpu")
    plain = 5000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.tensor(factors), stretched)


def test_embeddings_without_a_token_get_an_unused_one(tokenizer, card, tmp_path):
    folder = tmp_path / "model"
    model = build_model(tiny_config("qwen2"), tokenizer, seed=1)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    save_model(model, tokenizer, folder, card)
    config = AutoConfig.from_pretrained(folder)
    write_gguf(
        open_checkpoint(str(folder)), config, tokenizer, tmp_path / "model.gguf",
        kind="f16", name="padded", advance=lambda _: None,
    )  # fmt: skip
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[rows:] == [int(gguf.TokenType.UNUSED)] * 3
    assert int(gguf.TokenType.UNUSED) not in types[:rows]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, r"a gpt2 model cannot be written as GGUF\. It can for llama"),
        ({"model_type": "gemma3"}, "a gemma3 model cannot be written"),
        (tiny_config("gemma2", head_dim=8), "scales attention by 8, not by query_pre_attn_scalar"),
        (tiny_config("gemma2", attn_logit_softcapping=None), "gemma2 caps attention"),
        (
            tiny_config("gemma3_text", layer_types=["full_attention"] * 2),
            "beyond its window in every layer number 6",
        ),
        (tiny_config("smollm3", no_rope_layers=[0, 1]), "leaves rope out of every layer number 4"),
        (tiny_config("qwen3_moe", norm_topk_prob=False), "weights of the chosen experts"),
        (tiny_config("qwen3_moe", norm_topk_prob=True, mlp_only_layers=[0]), "in every layer"),
        (tiny_config("qwen2", rope_parameters=LLAMA3_ROPE), "rope type llama3 of a qwen2 model"),
        (tiny_config("llama", hidden_act="gelu"), "has the activation silu, not gelu"),
        (tiny_config("qwen2", use_sliding_window=True), "sliding window"),
        (
            tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4,
                                                  "factor": 2.0}),
            "rope type dynamic",
        ),
        (tiny_config("qwen2", rope_parameters=YARN | {"beta_fast": 16}), "YaRN with beta_fast 32 "),
        (tiny_config("llama", rope_parameters=YARN | {"truncate": False}), "with truncate True"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, expected):
    with pytest.raises(ModelError, match=expected):
        check_supported(AutoConfig.for_model(**config))


def test_an_unknown_way_to_split_texts_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(load_tokenizer(str(tmp_path)))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace(r"\\p{N}|", r"\\p{N}{1,2}|"), "utf-8")
    with pytest.raises(ModelError, match="does not support how this tokenizer splits"):
        check_tokenizer(load_tokenizer(str(tmp_path)))
