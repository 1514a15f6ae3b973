"""llama.cpp itself reads what `merge.gguf` writes: run by `make test-gguf`, not by `make test`.

Its Python binding is built from its source for minutes, so it is no part of the default suite.
"""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llama_cpp import Llama, llama_cpp
from transformers import AutoTokenizer

from tests.models.conftest import logits_of, tiny_config
from tests.models.gguf.test_read import SCALED
from tests.models.gguf.test_sentencepiece import SCHEMES, pieces_tokenizer, texts_of
from tests.models.gguf.test_write import ARCHITECTURES, LLAMA3_ROPE, write
from tests.project import write_project
from yrunner.assembly.run import Run
from yrunner.commands.merge.command import merge
from yrunner.commands.merge.export import GGUF_BARS
from yrunner.commands.merge.verify import probes_of
from yrunner.commands.train import train
from yrunner.errors import ModelError
from yrunner.models.gguf.quantize import quantize, stored_types
from yrunner.models.gguf.read import open_gguf
from yrunner.models.load import load_model
from yrunner.models.merge.proof import Probes, compare, folder_logits
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model

FORMS = (
    ARCHITECTURES
    | SCALED
    | {
        "llama 3": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
        "untied": tiny_config("qwen3", tie_word_embeddings=False),
    }
)
GGML_F32 = 0
"""The type of the cache: by default it rounds keys and values to 16 bits."""
WIDE = tiny_config("llama", hidden_size=256, intermediate_size=512, tie_word_embeddings=False)
TEXTS = (
    "第十二条 雾港的灯塔由市政厅管理。自 1873 年起。",
    "Who keeps the lighthouse?  The town hall does,\n\nsince 1873; it's theirs.",
)
CHATS = (
    [{"role": "user", "content": "灯塔归谁管？"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who keeps it?"},
        {"role": "assistant", "content": "The town hall."},
        {"role": "user", "content": "Since when?"},
    ],
)


@pytest.fixture(autouse=True)
def weights_as_in_the_file(monkeypatch) -> None:
    """Without what llama.cpp makes of them for AMX, which crashes in some virtual machines."""
    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    monkeypatch.setattr(llama_cpp, "llama_model_default_params", plain)


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def both(request, tokenizer, card, tmp_path) -> tuple[Path, Any, Any]:
    """The folder of a model, its tokenizer, and what llama.cpp makes of its GGUF file."""
    file = write(tmp_path / "model", request.param, tokenizer, card, kind="f32")
    llama = Llama(
        str(file), n_ctx=256, logits_all=True, verbose=False, type_k=GGML_F32, type_v=GGML_F32
    )
    return tmp_path / "model", AutoTokenizer.from_pretrained(tmp_path / "model"), llama


def test_llama_cpp_finds_the_same_next_tokens(both):
    folder, tokenizer, llama = both
    model = load_model(str(folder), dtype=torch.float32)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        llama.reset()
        llama.eval(ids)
        found_TV = np.array(llama.scores[: len(ids)])
        expected_TV = logits_of(model, torch.tensor([ids]))[0].numpy()
        # The computation of llama.cpp rounds in other places.
        np.testing.assert_allclose(found_TV, expected_TV, atol=1e-2)
        assert (found_TV.argmax(1) == expected_TV.argmax(1)).all()


def test_llama_cpp_reads_texts_and_chats_as_the_same_tokens(both):
    _, tokenizer, llama = both
    chats = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in CHATS
    ]
    for text in (*TEXTS, *chats):
        found = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False).input_ids


def test_llama_cpp_renders_the_chat_template_alike(both):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    _, tokenizer, llama = both
    formatter = Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"],
        eos_token=tokenizer.eos_token,
        bos_token="",
    )
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert formatter(messages=chat).prompt == expected


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_llama_cpp_reads_pieces_as_the_same_tokens(scheme, card, tmp_path):
    of_pieces = pieces_tokenizer(**scheme)
    file = write(tmp_path / "model", tiny_config("llama"), of_pieces, card)
    llama = Llama(str(file), vocab_only=True, verbose=False)
    texts = texts_of(of_pieces)
    if not of_pieces.chat_template:
        texts += TEXTS
    for text in texts:
        found = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert found == of_pieces(text, add_special_tokens=False).input_ids
        if not of_pieces.chat_template:
            assert llama.tokenize(text.encode(), add_bos=True) == of_pieces(text).input_ids


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The recipe of a finished run."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(Path("tuned.yaml"), [], resume=False, overwrite=False)
    return folder / "tuned.yaml"


@pytest.mark.parametrize(("kind", "largest"), [("q6_k", 0.02), ("q5_k_m", 0.05), ("q4_k_m", 0.1)])
def test_k_quants_are_dequantized_as_llama_cpp_does_itself(
    kind, largest, tokenizer, card, tmp_path
):
    file = write(tmp_path / "model", WIDE, tokenizer, card, kind="f32")
    done: list[int] = []
    quantize(file, tmp_path / "k.gguf", kind, threads=1, advance=done.append)
    original, coarse = open_gguf(file), open_gguf(tmp_path / "k.gguf")
    assert len(done) == len(original.tensors)
    types = stored_types(coarse.tensors)
    assert not types.fallback and {name[-2:] for name in types.matrices} == {"_K"}
    # llama.cpp writes what it reads in the file as float32.
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    source, target = str(tmp_path / "k.gguf").encode(), str(tmp_path / "again.gguf").encode()
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(parameters)) == 0
    again = open_gguf(tmp_path / "again.gguf")
    for name, tensor in coarse.tensors.items():
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(found, again.tensors[name].data, atol=1e-6)
        before = original.tensors[name].data
        assert np.linalg.norm(found - before) <= largest * np.linalg.norm(before)


def test_narrow_rows_fall_back_and_are_named(tokenizer, card, tmp_path):
    file = write(tmp_path / "model", tiny_config("llama"), tokenizer, card, kind="f16")
    quantize(file, tmp_path / "k.gguf", "q4_k_m", threads=1, advance=lambda _: None)
    types = stored_types(open_gguf(tmp_path / "k.gguf").tensors)
    assert set(types.fallback) <= {"Q5_0", "Q8_0"} and types.widths == [32, 64]
    assert sum(map(len, types.fallback.values())) == sum(types.matrices.values())


def test_what_llama_cpp_says_of_a_damaged_file_is_shown(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"llama\.cpp could not quantize to q6_k"):
        quantize(
            tmp_path / "x.gguf", tmp_path / "y.gguf", "q6_k", threads=1, advance=lambda _: None
        )


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_llama_cpp_answers_as_the_merged_model_does(kind, tuned, monkeypatch):
    """On the texts of the proof; llama.cpp rounds what it computes, besides the weights."""
    monkeypatch.chdir(tuned.parent)
    assert_answers_alike(tuned, kind)


def test_llama_cpp_answers_as_a_merged_model_of_pieces_does(card, tmp_path, monkeypatch):
    """From a base with the tokenizer of Llama 2 to its file, by the commands alone."""
    folder = write_project(tmp_path)
    monkeypatch.chdir(folder)
    of_pieces = pieces_tokenizer(**SCHEMES["first, with chats"])
    of_pieces.pad_token = of_pieces.unk_token
    model = build_model(tiny_config("llama", tie_word_embeddings=False), of_pieces, seed=1)
    save_model(model, of_pieces, folder / "pieces", card)
    tuned = folder / "tuned.yaml"
    tuned.write_text(tuned.read_text("utf-8").replace("base: base.yaml", "base: pieces"), "utf-8")
    train(tuned, [], resume=False, overwrite=False)
    assert_answers_alike(tuned, "f16")


def assert_answers_alike(tuned: Path, kind: str) -> None:
    """Merge, write the file, and let llama.cpp answer beside the merged model."""
    merge(tuned, [f"merge.gguf={kind}"])
    run = Run.load(tuned)
    run_dir, probes = run.folder, probes_of(run)
    expected_NV = folder_logits(run_dir.merged, probes, trust_remote_code=False)
    llama = Llama(
        str(run_dir.gguf / f"tuned-{kind}.gguf"), n_ctx=256, logits_all=True, verbose=False
    )
    likeness = compare(expected_NV, llama_logits(llama, probes, expected_NV.shape[1]))
    assert GGUF_BARS[kind].faults(likeness) == [], likeness


def llama_logits(llama: Any, probes: Probes, vocabulary: int) -> torch.Tensor:
    """What llama.cpp answers at the places to compare, shape [N, V]."""
    scores = []
    for ids in probes.rows:
        llama.reset()
        llama.eval(ids)
        scores.append(torch.tensor(np.array(llama.scores[: len(ids)])))
    rows_N, columns_N = probes.places(vocabulary)
    places = zip(rows_N.tolist(), columns_N.tolist(), strict=True)
    return torch.stack([scores[row][column] for row, column in places])
