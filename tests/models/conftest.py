"""Tiny tokenizers and models, built here so that nothing is downloaded."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from yrunner.models.save import ModelCard, save_model
from yrunner.models.scratch import build_model, train_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODEL_TYPES = ["qwen3", "qwen2", "llama"]
TEXTS = [
    "第十二条 雾港的灯塔由市政厅管理。The lighthouse of Fog Harbour is kept by the town hall.",
    "问：灯塔归谁管？答：归市政厅管。Who keeps the lighthouse? The town hall does, since 1873.",
] * 4


def tiny_config(model_type: str, **changes: object) -> dict[str, object]:
    head = {"head_dim": 8} if model_type == "qwen3" else {}
    return {"model_type": model_type, **SIZES, **head, **changes}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(params=MODEL_TYPES)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """One tiny model of each kind."""
    return build_model(tiny_config(request.param), tokenizer, seed=1)


@pytest.fixture
def qwen3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_model(tiny_config("qwen3"), tokenizer, seed=1)


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        name="legal-sft",
        base=None,
        tuning="full",
        recipe='name: legal-sft\ndata:\n  system: "```"\n',
        figures=[("exact answers | legal", "38 of 40")],
        dataset_files=["data/legal_train.jsonl"],
    )


@pytest.fixture
def base_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: ModelCard, tmp_path: Path
) -> Path:
    """A saved model of each kind, with its tokenizer."""
    folder = tmp_path / "base"
    save_model(model, tokenizer, folder, card)
    return folder


@pytest.fixture
def qwen3_folder(
    qwen3: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: ModelCard, tmp_path: Path
) -> Path:
    folder = tmp_path / "qwen3"
    save_model(qwen3, tokenizer, folder, card)
    return folder


@pytest.fixture
def ids_BT(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.tensor([tokenizer("灯塔由市政厅管理 in 1873").input_ids])


def logits_of(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] without dropout."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits


def train_one_step(model: torch.nn.Module, ids_BT: torch.Tensor) -> None:
    """One large AdamW step, so that whatever is trained moves."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):  # the first step moves only LoRA's zero half
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
