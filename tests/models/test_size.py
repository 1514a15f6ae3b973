"""Bytes on disk by the estimate against files that are really written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.models.conftest import tiny_config
from yrunner.models.meta import build_fake_model
from yrunner.models.save import ModelCard, save_model
from yrunner.models.scratch import build_model
from yrunner.models.size import estimate_disk, saved_weight_bytes
from yrunner.models.tuning import apply_tuning, count_parameters
from yrunner.recipe.schema.model import FreezeTuning, FullTuning, LoraTuning, Tuning

TUNINGS = [FullTuning(kind="full"), FreezeTuning(kind="freeze"), LoraTuning(rank=32)]
LARGER = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_checkpoint(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The large files of Trainer's."""
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning.kind)
def test_the_estimate_is_within_a_quarter_of_what_is_written(
    tuning: Tuning,
    tied: bool,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    tmp_path: Path,
):
    base = build_model(tiny_config("qwen3", **LARGER, tie_word_embeddings=tied), tokenizer, seed=1)
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = base.name_or_path = str(tmp_path / "base")
    model = apply_tuning(base, tuning)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    write_checkpoint(model, optimizer, tmp_path / "checkpoint")
    save_model(model, tokenizer, tmp_path / "model", card)

    weightless = build_fake_model(base.config, tuning, dtype=torch.float32)
    need = estimate_disk(weightless, 8 * count_parameters(weightless)[0], tokenizer)
    assert need.checkpoint == pytest.approx(bytes_in(tmp_path / "checkpoint"), rel=0.25)
    assert need.model == pytest.approx(bytes_in(tmp_path / "model"), rel=0.25)


def test_weights_keep_their_own_dtypes(make_model: Callable[..., Any]):
    config = make_model().config
    half = build_fake_model(config, FreezeTuning(kind="freeze"), dtype=torch.bfloat16)
    trained, everything = count_parameters(half)
    assert saved_weight_bytes(half) == 4 * trained + 2 * (everything - trained)
