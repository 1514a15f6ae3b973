"""The trainings that benchmarks/ranks.py compares: their model, their rows, what they come to."""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from yrunner.data.batching.collate import all_in_one_row
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.recipe.schema.distributed import DeepSpeedSection
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.recipe.schema.recipe import Checkpoint, NlirgLoss, PlainLoss
from yrunner.scoring.base_predictions import keep_tops
from yrunner.tokens import IGNORE_INDEX

TOPS = "tops.safetensors"
PAD = 0
ALONE = "one"
"""The sharing of a process that has nobody to share with."""
VOCABULARY = 97
SHARINGS: dict[str, DeepSpeedSection | None] = {
    "ddp": None,
    "zero1": DeepSpeedSection(stage=1),
    "zero2": DeepSpeedSection(stage=2),
    "zero3": DeepSpeedSection(stage=3),
    "zero2_offload": DeepSpeedSection(stage=2, offload="cpu"),
    "zero3_offload": DeepSpeedSection(stage=3, offload="cpu"),
}
LOSSES = {
    "plain": PlainLoss(),
    "nlirg": NlirgLoss(kind="nlirg"),
    "nlirg_by_weights": NlirgLoss(kind="nlirg", normalize="weights"),
}
ROWS = {
    "alone": {},
    "packed": {"pack_to": 40, "layout": all_in_one_row},
    "token_batches": {"token_batch": 4},
}
TUNINGS: dict[str, Tuning] = {
    "full": FullTuning(kind="full"),
    "lora": LoraTuning(rank=4, alpha=8, dropout=0.0),
}
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_ratio": 0.0,
    "log_every": 1,
    "checkpoint": Checkpoint(every=3, keep=9),
}
MICRO_BATCHES = 4
"""Of an update, over all processes."""


@dataclass(frozen=True)
class Case:
    """One training."""

    sharing: str
    loss: str
    rows: str
    tuning: str
    dtype: str = "float32"
    """That of the computation."""
    keep: str = "none"
    """What the model is held to, see ranks_keep.py."""

    @property
    def name(self) -> str:
        """As it is printed, and called on the disk."""
        return "-".join(asdict(self).values())

    def result(self, folder: Path) -> Path:
        """The file with what it came to."""
        return folder / f"{self.name}.pt"

    @property
    def alone(self) -> "Case":
        """The same in one process, without sharing anything."""
        return replace(self, sharing=ALONE)


@dataclass(frozen=True)
class Found:
    """What a training came to."""

    losses: list[float]
    """Of training, plain and weighted, and of validation, as they were logged."""
    weights: dict[str, Tensor]
    drifts: list[float]
    """From the base, of every validation."""
    kept: list[float]
    """What was logged of that which the model is held to."""

    def loss_gap(self, other: "Found") -> float:
        """The largest difference of two losses, relative."""
        assert len(self.losses) == len(other.losses), "as many records"
        pairs = zip(self.losses, other.losses, strict=True)
        return max(abs(mine - theirs) / abs(mine) for mine, theirs in pairs)

    def weight_gap(self, other: "Found") -> float:
        """Relative L2 distance of all weights."""
        names = sorted(set(self.weights) & set(other.weights))
        assert names and len(names) == len(other.weights), "the same weights"
        mine, theirs = (
            torch.cat([found.weights[name].double().flatten() for name in names])
            for found in (self, other)
        )
        return float((mine - theirs).norm() / mine.norm())


def make_examples(number: int, seed: int) -> list[TokenizedExample]:
    """Random tokens in very uneven lengths, the first ones without labels."""
    chance = random.Random(seed)
    examples = []
    for row in range(1, number + 1):
        ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(6, 36))]
        start = chance.randrange(1, len(ids) - 2)
        labels = [IGNORE_INDEX] * start + ids[start:]
        examples.append(TokenizedExample(ids, labels, Origin(Path("random"), row)))
    return examples


def write_base(folder: Path, *, times: int = 1) -> None:
    """A tiny model, from whose weights everything is trained, and what it predicts of rows.

    It is so many `times` as wide.
    """
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32 * times,
        intermediate_size=48 * times,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tops = keep_tops(model, WATCHED, top=VOCABULARY, pad_token_id=PAD, max_tokens=200)
    tops.save(folder / TOPS)


LEARNED, VALIDATED, WATCHED = (
    make_examples(19, seed=1),
    make_examples(5, seed=2),
    make_examples(3, seed=3),
)
"""The rows of training and of validation, and those on which the drift is measured."""
