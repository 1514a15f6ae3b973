"""The trainings of `benchmarks.ranks`: cases, model, rows and results."""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from yrunner.data.batching.answers import ComparedRows
from yrunner.data.batching.collate import all_in_one_row
from yrunner.data.conversation import RatedExample, TokenizedExample, TokenizedPair
from yrunner.errors import Origin
from yrunner.recipe.schema.distributed import DeepSpeedSection
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.recipe.schema.preference import BradleyTerryLoss, DpoLoss, KtoLoss, OrpoLoss
from yrunner.recipe.schema.recipe import Checkpoint, NlirgLoss, PlainLoss
from yrunner.recipe.schema.rl import GrpoLoss, RlooLoss
from yrunner.scoring.base_predictions import cache_predictions
from yrunner.scoring.stored_predictions import store_predictions
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.preference.reference import Reference, measure_reference

TOPS = "tops.safetensors"
TEACHER = "teacher"
STORED = 8
"""Likeliest tokens of the teacher that are kept."""
PAD = 0
ALONE = "one"
"""The name of training in one process, in the place of a way of sharing."""
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
PREFERENCES = {
    "dpo": DpoLoss(kind="dpo", sft=0.2),
    "orpo": OrpoLoss(kind="orpo"),
    "kto": KtoLoss(kind="kto"),
}
"""Losses over pairs and rated answers."""
REWARD = {"bradley_terry": BradleyTerryLoss(kind="bradley_terry", center=0.01)}
"""That of a reward model."""
POLICIES = {
    "grpo": GrpoLoss(kind="grpo"),
    "dapo": GrpoLoss(kind="grpo", preset="dapo"),
    "rloo": RlooLoss(kind="rloo"),
}
"""Losses over rewarded answers; see rewards.py."""
ROWS = {
    "alone": {},
    "packed": {"pack_to": 40, "layout": all_in_one_row},
    "token_batches": {"token_batch": 4, "epochs": 1},
}
"""One epoch of token batches has more updates than two of whole rows."""
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
"""Micro-batches per update, over all processes."""


@dataclass(frozen=True)
class Case:
    """One training."""

    sharing: str
    loss: str
    rows: str
    tuning: str
    dtype: str = "float32"
    """Dtype of the computation."""
    keep: str = "none"
    """The regulariser, see regularisers.py."""
    teacher: str = "none"
    """`live`: beside the student. `stored`: its likeliest tokens."""

    @property
    def name(self) -> str:
        """Name for printing and for files."""
        return "-".join(asdict(self).values())

    def result_file(self, folder: Path) -> Path:
        """Path of the saved result."""
        return folder / f"{self.name}.pt"

    @property
    def alone(self) -> "Case":
        """The same training in one process."""
        return replace(self, sharing=ALONE)


@dataclass(frozen=True)
class Result:
    """What a training logged, and its final weights."""

    losses: list[float]
    """Logged training losses, plain and weighted, and validation losses; rewards of a policy."""
    weights: dict[str, Tensor]
    drifts: list[float]
    """Drift from the base at every validation."""
    kept: list[float]
    """Logged figures of the regulariser."""
    taught: list[float]
    """Divergences from the teacher, in training and in validation."""

    def loss_gap(self, other: "Result") -> float:
        """Return the largest relative difference of two losses."""
        assert len(self.losses) == len(other.losses), "both must have the same number of records"
        pairs = zip(self.losses, other.losses, strict=True)
        return max(abs(mine - theirs) / abs(mine) for mine, theirs in pairs)

    def weight_gap(self, other: "Result") -> float:
        """Return the relative L2 distance of all weights."""
        names = sorted(set(self.weights) & set(other.weights))
        assert names and len(names) == len(other.weights), "both must have the same weights"
        mine, theirs = (
            torch.cat([result.weights[name].double().flatten() for name in names])
            for result in (self, other)
        )
        return float((mine - theirs).norm() / mine.norm())


def make_examples(num_rows: int, seed: int) -> list[TokenizedExample]:
    """Make rows of random tokens and very uneven lengths; the first tokens have no labels."""
    generator = random.Random(seed)
    examples = []
    for row in range(1, num_rows + 1):
        ids = [generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(6, 36))]
        start = generator.randrange(1, len(ids) - 2)
        labels = [IGNORE_INDEX] * start + ids[start:]
        examples.append(TokenizedExample(ids, labels, Origin(Path("random"), row)))
    return examples


def write_base(folder: Path, *, times: int = 1) -> None:
    """Save the tiny base of all trainings, and its predictions for the drift rows.

    `times`: factor of the model's width.
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
    tops = cache_predictions(model, DRIFT_ROWS, top=VOCABULARY, pad_token_id=PAD, max_tokens=200)
    tops.save(folder / TOPS)
    write_teacher(folder / TEACHER)
    for loss in PREFERENCES:
        parts = compared_rows(loss)
        found = [measure_reference(model, part, pad_token_id=PAD, max_tokens=200) for part in parts]
        (folder / loss).mkdir()
        Reference(*found).save(folder / loss)


def write_teacher(folder: Path) -> None:
    """Save a wider model, and its likeliest tokens for all rows."""
    config = Qwen3Config(
        vocab_size=VOCABULARY + 3,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data.mul_(20)  # unsure of everything, it would teach nothing
    model.save_pretrained(folder)
    store_predictions(
        folder,
        model,
        [*TRAIN_ROWS, *VALIDATION_ROWS],
        advance=lambda _: None,
        top=STORED,
        num_tokens=VOCABULARY,
        pad_token_id=PAD,
        max_tokens=200,
    )


def compared_rows(loss: str) -> tuple[ComparedRows, ComparedRows]:
    """The training and the validation rows of a loss over preferences."""
    parts = [(TRAIN_ROWS, make_examples(19, seed=4)), (VALIDATION_ROWS, make_examples(5, seed=5))]
    rated = loss == "kto"
    train, validation = (
        ComparedRows(
            [_compare(*rows, rated=rated) for rows in zip(*part, strict=True)], rated=rated
        )
        for part in parts
    )
    return train, validation


def _compare(
    better: TokenizedExample, other: TokenizedExample, *, rated: bool
) -> TokenizedPair | RatedExample:
    """Two answers to one prompt, or the first of them with a rating by its length."""
    if rated:
        return RatedExample(better, len(better.input_ids) % 3 == 0)
    start, place = better.target_positions[0], other.target_positions[0]
    ids = better.input_ids[:start] + other.input_ids[place:]
    labels = [IGNORE_INDEX] * start + ids[start:]
    return TokenizedPair(better, TokenizedExample(ids, labels, better.origin))


TRAIN_ROWS, VALIDATION_ROWS, DRIFT_ROWS = (
    make_examples(19, seed=1),
    make_examples(5, seed=2),
    make_examples(3, seed=3),
)
