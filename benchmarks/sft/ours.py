"""Train with yrunner or transformers' Trainer: python -m benchmarks.sft.ours FOLDER TRAINER"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.in_turns import print_seconds
from benchmarks.sft.inputs import BATCH_SIZE, read_rows
from yrunner.assembly.trainer import layout_for
from yrunner.data.batching.batches import Batches
from yrunner.data.batching.collate import collate
from yrunner.data.batching.plan import make_plan
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.models.layers.example_attention import attend_by_example
from yrunner.models.limits import isolates_examples
from yrunner.models.load import load_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning
from yrunner.recipe.schema.recipe import Loss, NlirgLoss, PlainLoss, TrainSection
from yrunner.storage.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.loop import Trainer as OurTrainer
from yrunner.training.objective import TargetObjective
from yrunner.training.spike_guard import SpikeGuard


def read_examples(folder: Path) -> list[Any]:
    """Read the rows as examples; prompts are context, replies and their end are targets."""
    return [
        TokenizedExample(
            prompt + reply, [IGNORE_INDEX] * len(prompt) + reply, Origin("rows", number)
        )
        for number, (prompt, reply) in enumerate(read_rows(folder), 1)
    ]


def load_lora(folder: Path) -> Any:
    """Load the model with a new adapter."""
    model = load_model(
        str(folder / "model"), dtype=torch.float32, attention="sdpa", trust_remote_code=False
    )
    return apply_tuning(model, LoraTuning(rank=16, dropout=0.0))


def ours(folder: Path, loss: Loss) -> None:
    """Train as `yrun train` does, in the batch layout that it chooses."""
    examples, model = read_examples(folder), load_lora(folder)
    train = TrainSection(epochs=1, batch_size=BATCH_SIZE)
    plan = make_plan(
        [len(example.target_positions) for example in examples],
        lengths=[len(example.input_ids) for example in examples],
        token_batch=0,
        batch_size=BATCH_SIZE,
        accumulation=1,
        epochs=1,
        max_updates=None,
        order="shuffle",
        seed=0,
    )
    run_dir = RunDir(folder / loss.kind)
    arguments = make_arguments(
        train,
        folder=run_dir.checkpoints,
        name=loss.kind,
        num_updates=plan.num_updates,
        seed=0,
        dtype=torch.float32,
    )
    weight, loss_deadline = token_weight(loss)
    trainer = OurTrainer(
        model,
        arguments,
        Batches(plan, examples, [], pad_token_id=0),
        TargetObjective(
            weight, loss_deadline=loss_deadline, normalize="targets", guard=SpikeGuard(train.spikes)
        ),
        Cadence(plan.num_updates),
        run_dir,
    )
    isolates = attend_by_example(trainer.model) or isolates_examples(trainer.model)
    trainer.batches.layout = layout_for(model.config, isolates=isolates)
    print_seconds(trainer.train)


def plain_trainer(folder: Path) -> None:
    """Train with Trainer: padded batches, logits of all tokens, the loss of the model."""

    def pad(examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(examples, pad_token_id=0)
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        columns = torch.arange(batch["input_ids"].shape[1])
        return {**batch, "attention_mask": (columns < lengths[:, None]).long()}

    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=1e-4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=load_lora(folder),
        args=arguments,
        train_dataset=read_examples(folder),
        data_collator=pad,
    )
    print_seconds(trainer.train)


TRAINERS: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: ours(folder, PlainLoss()),
    "nlirg": lambda folder: ours(folder, NlirgLoss(kind="nlirg")),
    "trainer": plain_trainer,
}

if __name__ == "__main__":
    TRAINERS[sys.argv[2]](Path(sys.argv[1]))
