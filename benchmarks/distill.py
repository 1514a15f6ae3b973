"""How fast is distillation with LoRA, compared with TRL's GKD, and how much memory does it take?

    python -m benchmarks.distill [--vocabulary 151936] [--rows 16] [--trl PYTHON]

Trains LoRA of rank 16 on rows in batches of 4, in float32, from a Qwen3 model of random weights;
the teacher is another one, with twice as many layers. Each trainer runs in a separate process, in
turns, on the same models and the same rows. TRL learns the Jensen-Shannon divergence alone; `all`
computes it beside the loss of the labels; `top` reads the teacher's 64 likeliest tokens from disk,
and its time includes writing them. Reports the time of the training loop and the peak memory of the
process.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.in_turns import parser_of, print_runs, print_seconds, run_in_turns
from benchmarks.sft.inputs import BATCH_SIZE, EOS_ID, read_rows, save_model, write_rows

LEARNING_RATE = 1e-4
BETA = 0.5
TOP = 64
TEACHER_LAYERS = 8


def save_teacher(folder: Path, vocabulary_size: int) -> None:
    """Save a deeper model with the student's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder / "model")
    config.num_hidden_layers = TEACHER_LAYERS
    config.layer_types = ["full_attention"] * TEACHER_LAYERS
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")


def ours(folder: Path, *, stores: bool) -> None:
    """Train as `yrun train` does, in the batch layout that it chooses."""
    import torch

    from benchmarks.sft.ours import load_lora, read_examples
    from yrunner.assembly.trainer import layout_for
    from yrunner.data.batching.plan import make_plan
    from yrunner.data.batching.taught import TaughtBatches
    from yrunner.losses.distillation import TeacherDivergence
    from yrunner.losses.targets import PLAIN
    from yrunner.models.layers.example_attention import attend_by_example
    from yrunner.models.limits import isolates_examples
    from yrunner.recipe.schema.recipe import TrainSection
    from yrunner.storage.run_dir import RunDir
    from yrunner.training.arguments import make_arguments
    from yrunner.training.callbacks import Cadence
    from yrunner.training.distillation.objective import TaughtObjective
    from yrunner.training.loop import Trainer
    from yrunner.training.spike_guard import SpikeGuard

    examples = read_examples(folder)
    train = TrainSection(epochs=1, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    counts = [len(example.target_positions) for example in examples]
    plan = make_plan(
        counts,
        lengths=[len(example.input_ids) for example in examples],
        token_batch=0,
        batch_size=BATCH_SIZE,
        accumulation=1,
        epochs=1,
        max_updates=None,
        order="shuffle",
        seed=0,
    )
    run_dir = RunDir(folder / f"ours-{stores}")
    run_dir.folder.mkdir(exist_ok=True)
    arguments = make_arguments(
        train,
        folder=run_dir.checkpoints,
        name="distill",
        num_updates=plan.num_updates,
        seed=0,
        dtype=torch.float32,
    )

    started = time.perf_counter()
    objective = TaughtObjective(
        PLAIN,
        loss_deadline=15.0,
        normalize="targets",
        guard=SpikeGuard(train.spikes),
        teacher=_teacher(folder, examples, run_dir.folder if stores else None),
        divergence=TeacherDivergence("jsd", beta=BETA),
        teacher_share=0.5,
    )
    batches = TaughtBatches(plan, examples, [], pad_token_id=0)
    cadence = Cadence(plan.num_updates)
    trainer = Trainer(load_lora(folder), arguments, batches, objective, cadence, run_dir)
    isolates = attend_by_example(trainer.model) or isolates_examples(trainer.model)
    trainer.batches.layout = layout_for(trainer.model.config, isolates=isolates)
    print_seconds(trainer.train, started if stores else None)


def _teacher(folder: Path, examples: list[Any], store: Path | None) -> Any:
    """The teacher in memory, or what it predicts for the rows, written now."""
    import numpy as np
    import torch

    from yrunner.losses.fused_head import attach
    from yrunner.models.load import load_model
    from yrunner.scoring.stored_predictions import StoredPredictions, store_predictions
    from yrunner.training.distillation.teacher import LiveTeacher, StoredTeacher

    model: Any = load_model(str(folder / "teacher"), dtype=torch.float32)
    model.requires_grad_(False).eval()
    attach(model)
    if store is None:
        return LiveTeacher(model)
    options: dict[str, Any] = {"top": TOP, "pad_token_id": 0, "max_tokens": 2048}
    store_predictions(store, model, examples, advance=lambda _: None, **options)
    counts = np.array([len(example.target_positions) for example in examples])
    return StoredTeacher(StoredPredictions.open(store, counts))


def with_trl(folder: Path) -> None:
    """Train with TRL's GKDTrainer, on the rows as they are."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(name: str, filler: int) -> torch.Tensor:
            width = max(len(row[name]) for row in rows)
            return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

        return {
            "input_ids": padded("input_ids", 0),
            "attention_mask": padded("mask", 0),
            "labels": padded("labels", -100),
            "prompts": padded("prompt", 0),
            "prompt_attention_mask": padded("prompt_mask", 0),
        }

    rows = [
        {
            "input_ids": prompt + reply,
            "mask": [1] * len(prompt + reply),
            "labels": [-100] * len(prompt) + reply,
            "prompt": prompt,
            "prompt_mask": [1] * len(prompt),
        }
        for prompt, reply in read_rows(folder)
    ]
    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lmbda=0.0,
        beta=BETA,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.eos_token_id == EOS_ID
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher"),
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print_seconds(trainer.train)


TRAINERS: dict[str, Callable[[Path], None]] = {
    "all": lambda folder: ours(folder, stores=False),
    "top": lambda folder: ours(folder, stores=True),
    "trl": with_trl,
}


def compare(options: argparse.Namespace) -> None:
    """Run the trainers in turns, and print medians and ratios."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        save_teacher(folder, options.vocabulary)
        write_rows(folder, options.rows, options.vocabulary)
        runs = run_in_turns("benchmarks.distill", TRAINERS, folder, options)
    print_runs(runs, "trl")


def main() -> None:
    """Train, or compare the trainers."""
    parser = parser_of(__doc__, TRAINERS, vocabulary=151_936, repeats=3)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    if options.train:
        TRAINERS[options.train](options.folder)
    else:
        compare(options)


if __name__ == "__main__":
    main()
