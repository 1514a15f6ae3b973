"""A GGUF file holds the model: read back it answers alike, token for token."""

import gguf
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.conftest import logits_of, tiny_config
from yrunner.errors import ModelError
from yrunner.models.gguf.read import open_gguf
from yrunner.models.gguf.tokenizer import check_tokenizer, read_tokenizer
from yrunner.models.gguf.write import check_supported, read_gguf, write_gguf
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
TEXTS = ["第十二条 雾港的灯塔由市政厅管理。", "Who keeps it,  since 1873?\n\n<|im_end|> a"]


def write(folder, config, tokenizer, card, *, kind="f32", seed=1):
    """A model of this config as folder and as GGUF file."""
    save_model(build_model(config, tokenizer, seed), tokenizer, folder, card)
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


@pytest.fixture(params=["qwen3", "qwen2", "llama", "mistral"])
def form(request):
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_every_form_answers_alike_when_it_is_read_back(
    form, tied, tokenizer, card, ids_BT, tmp_path
):
    config = tiny_config(form, tie_word_embeddings=tied)
    file = write(tmp_path / "model", config, tokenizer, card)
    read = read_gguf(file, AutoConfig.from_pretrained(tmp_path / "model"))
    expected = logits_of(load_model(str(tmp_path / "model"), dtype=torch.float32), ids_BT)
    torch.testing.assert_close(logits_of(read, ids_BT), expected, rtol=0, atol=1e-5)


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
    file = write(tmp_path / "model", tiny_config(form), tokenizer, card)
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
        ({"model_type": "gemma2"}, "a gemma2 model cannot be written"),
        (tiny_config("qwen2", use_sliding_window=True), "sliding window"),
        (
            tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4,
                                                  "factor": 2.0}),
            "rope type dynamic",
        ),
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
