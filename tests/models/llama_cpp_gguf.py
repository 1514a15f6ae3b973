"""llama.cpp itself reads what `merge.gguf` writes: run by `make test-gguf`, not by `make test`.

Its Python binding is built from its source for minutes, so it is no part of the default suite.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from transformers import AutoTokenizer

from tests.models.conftest import logits_of, tiny_config
from tests.models.test_gguf_file import LLAMA3_ROPE, write
from yrunner.models.load import load_model

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
