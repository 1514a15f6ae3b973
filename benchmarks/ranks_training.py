"""One small training in one process or in several, every way of sharing memory out."""

import os
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, distributed
from transformers import Qwen3Config, Qwen3ForCausalLM

from yrunner.data.conversation import TokenizedExample
from yrunner.data.layouts import all_in_one_row, one_per_row
from yrunner.data.plan import make_plan
from yrunner.errors import Origin
from yrunner.models.load import load_model
from yrunner.models.quiet import quiet_libraries
from yrunner.models.tuning import apply_tuning
from yrunner.ranks import join_ranks, num_ranks, this_rank
from yrunner.recipe.schema import Checkpoint, NlirgLoss, PlainLoss, TrainSection
from yrunner.recipe.schema_distributed import DeepSpeedSection
from yrunner.recipe.schema_model import FullTuning, LoraTuning
from yrunner.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.cadence import Cadence
from yrunner.training.deepspeed_settings import complete, deepspeed_settings
from yrunner.training.metrics_file import MetricsFile, read_metrics
from yrunner.training.trainer import SignalTrainer

NUM_PROCESSES = 2
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
TUNINGS = {"full": FullTuning(kind="full"), "lora": LoraTuning(rank=4, alpha=8, dropout=0.0)}
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


def write_base(folder: Path) -> None:
    """A tiny model; everything is trained from its weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_trainer(case: Case, folder: Path, *, max_steps: int | None = None) -> SignalTrainer:
    """The trainer of a case in this process, whose base lies in `folder`."""
    rows = dict(ROWS[case.rows])
    layout, pack_to = rows.pop("layout", one_per_row), rows.pop("pack_to", None)
    train = TrainSection(**(SETTINGS | rows), max_steps=max_steps)
    learned, validated = make_examples(19, seed=1), make_examples(5, seed=2)
    plan = make_plan(
        [len(example.target_positions) for example in learned],
        token_batch=train.token_batch,
        batch_size=train.batch_size,
        accumulation=MICRO_BATCHES,
        epochs=train.num_epochs,
        max_updates=train.max_steps,
        order=train.order,
        seed=0,
        lengths=[len(example.input_ids) for example in learned],
        pack_to=pack_to,
    )
    run_dir = RunDir(folder / case.name)
    dtype = getattr(torch, case.dtype)
    section = SHARINGS.get(case.sharing)
    arguments = make_arguments(
        train,
        folder=run_dir.checkpoints,
        name=case.name,
        num_updates=plan.num_updates,
        seed=0,
        dtype=dtype,
        validates=True,
        micro_steps=MICRO_BATCHES // num_ranks(),
        deepspeed=None if section is None else complete(deepspeed_settings(section)),
    )
    run_dir.folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = load_model(str(folder / "base"), dtype=dtype)
    weight, loss_deadline = token_weight(LOSSES[case.loss])
    cadence = Cadence(
        epoch_ends=plan.epoch_ends,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint.every,
        validates=True,
    )
    trainer = SignalTrainer(
        model=apply_tuning(base, TUNINGS[case.tuning]),
        args=arguments,
        callbacks=[cadence, MetricsFile(run_dir.metrics)],
        train_examples=learned,
        validation_examples=validated,
        plan=plan,
        token_batch=train.token_batch,
        weight=weight,
        loss_deadline=loss_deadline,
        normalize=LOSSES[case.loss].normalize,
        pad_token_id=0,
        run_dir=run_dir,
        keep_checkpoints=train.checkpoint.keep,
        spikes=train.spikes,
    )
    trainer.use_layout(layout)
    # The last weights are compared, not the best.
    trainer.args.load_best_model_at_end = False
    return trainer


def train_case(case: Case, folder: Path, *, resume_at: int | None = None) -> Found:
    """Train, or go on after the checkpoint of an update; every process gets the losses."""
    trainer = make_trainer(case, folder)
    checkpoint = None if resume_at is None else str(trainer.run_dir.checkpoint(resume_at))
    with quiet_libraries():
        trainer.train(resume_from_checkpoint=checkpoint)
    weights = trainer.model.state_dict()
    if trainer.zero is not None:
        weights = trainer.zero.whole_weights()
    records = read_metrics(trainer.run_dir.metrics) if this_rank() == 0 else []
    keys = ("loss", "weighted_loss", "eval_loss")
    losses = [record[key] for record in records for key in keys if key in record]
    weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    return Found(losses, {name: value.detach().clone() for name, value in weights.items()})


def start_processes(
    cases: Sequence[Case],
    folder: Path,
    *,
    number: int = NUM_PROCESSES,
    resume_at: int | None = None,
    tell: Callable[[Case, Path], None] | None = None,
) -> None:
    """Train the cases in new processes, one case after the other; see `found_together`.

    `resume_at`: go on after the checkpoint of this update, which is there. `tell`: called by the
    first process with each case that is done, and the folder.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    arguments = (cases, folder, number, resume_at, tell, port)
    torch.multiprocessing.spawn(_work, arguments, nprocs=number)


def found_together(case: Case, folder: Path) -> Found:
    """What the processes came to."""
    content = torch.load(case.result(folder))
    return Found(content["losses"], content["weights"])


def save_found(found: Found, case: Case, folder: Path) -> None:
    """Keep it there."""
    torch.save(asdict(found), case.result(folder))


def _work(
    rank: int,
    cases: Sequence[Case],
    folder: Path,
    number: int,
    resume_at: int | None,
    tell: Callable[[Case, Path], None] | None,
    port: int,
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for case in cases:
        _forget_the_last_case()
        join_ranks(deepspeed=SHARINGS[case.sharing] is not None)
        found = train_case(case, folder, resume_at=resume_at)
        if rank == 0:
            save_found(found, case, folder)
            if tell is not None:
                tell(case, folder)
    distributed.destroy_process_group()


def _forget_the_last_case() -> None:
    """accelerate keeps one way of sharing for the life of a process."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state()
    PartialState._reset_state()
