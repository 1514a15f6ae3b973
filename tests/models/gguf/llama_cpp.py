"""llama.cpp itself reads what `merge.gguf` writes: run by `make test-gguf`, not by `make test`.

Its Python binding is built from its source for minutes, so it is no part of the default suite.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import Llama, llama_cpp
from transformers import AutoTokenizer

from tests.models.conftest import logits_of, tiny_config
from tests.models.gguf.test_sentencepiece import SCHEMES, pieces_tokenizer, texts_of
from tests.models.gguf.test_write import LLAMA3_ROPE, write
from tests.project import write_project
from yrunner.assembly.run import Run
from yrunner.commands.merge.command import merge
from yrunner.commands.merge.export import GGUF_BARS, probes_of
from yrunner.commands.train import train
from yrunner.models.load import load_model
from yrunner.models.merge.proof import Probes, compare, folder_logits
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model

FORMS = {
    "qwen3": tiny_config("qwen3", head_dim=16),
    "qwen2": tiny_config("qwen2"),
    "llama": tiny_config("llama"),
    "llama 3": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "mistral": tiny_config("mistral"),
    "untied": tiny_config("qwen3", tie_word_embeddings=False),
}
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
    llama = Llama(str(file), n_ctx=256, logits_all=True, verbose=False)
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
        np.testing.assert_allclose(found_TV, expected_TV, atol=2e-2)
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


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
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
