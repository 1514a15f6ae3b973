"""How fast is DPO with LoRA, compared with TRL, and how much memory does it take?

    python -m benchmarks.preference [--vocabulary 151936] [--trl PYTHON]
    python -m benchmarks.preference --beside apart --prompt 400 --answer 60

Trains LoRA of rank 16 on all linear layers on 64 pairs in batches of 4, in float32, from a Qwen3
model of random weights; the reference is the model without its adapter. Each trainer runs in a
separate process, in turns, on the same model and the same pairs: short prompts, answers of 8 to
400 tokens, or of the given typical lengths. Reports the time of the training loop and the peak
memory of the process. `--trl` takes the Python of an environment with TRL; default this one.
`--beside apart` compares with a training that computes the prompt of a pair for each answer.
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.in_turns import parser_of, print_runs, print_seconds, run_in_turns
from benchmarks.sft.inputs import EOS_ID, SPECIAL_TOKENS, save_model

PAIRS_AT_ONCE = 4
LEARNING_RATE = 1e-4
BETA = 0.1


def write_pairs(
    folder: Path, number: int, vocabulary_size: int, *, prompt: int = 30, answer: int = 90
) -> None:
    """Write pairs of random tokens; every trainer reads a word as a token id.

    `prompt`, `answer`: median lengths.
    """
    chance = random.Random(0)

    def text(mean: float, spread: float, least: int, most: int) -> str:
        length = min(most, max(least, round(chance.lognormvariate(mean, spread))))
        ids = (chance.randrange(len(SPECIAL_TOKENS), vocabulary_size) for _ in range(length))
        return " ".join(map(str, ids))

    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(number):
            row = {"prompt": text(log(prompt), 0.4, 4, 2 * prompt)}
            length = (log(answer), 1.0, 8, 9 * answer // 2)
            row |= {side: f" {text(*length)}" for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def ours(folder: Path, *, shares_prompts: bool = True) -> None:
    """Train as `yrun train` does, in the batch layout that it chooses."""
    import torch

    from benchmarks.sft.ours import load_lora
    from yrunner.assembly.trainer import layout_for
    from yrunner.data.batching.answers import AnswerBatches, ComparedRows
    from yrunner.data.batching.plan import make_plan
    from yrunner.data.conversation import TokenizedExample, TokenizedPair
    from yrunner.errors import Origin
    from yrunner.models.layers.example_attention import attend_by_example
    from yrunner.models.limits import branches_at_a_mask, isolates_examples
    from yrunner.recipe.schema.preference import DpoLoss
    from yrunner.recipe.schema.recipe import TrainSection
    from yrunner.storage.run_dir import RunDir
    from yrunner.tokens import IGNORE_INDEX
    from yrunner.training.arguments import make_arguments
    from yrunner.training.callbacks import Cadence
    from yrunner.training.loop import Trainer
    from yrunner.training.preference.objective import PreferenceObjective

    def answered(row: dict[str, str], side: str, number: int) -> TokenizedExample:
        prompt = list(map(int, row["prompt"].split()))
        answer = [*map(int, row[side].split()), EOS_ID]
        labels = [IGNORE_INDEX] * len(prompt) + answer
        return TokenizedExample(prompt + answer, labels, Origin(folder, number))

    lines = (folder / "pairs.jsonl").read_text("utf-8").splitlines()
    pairs = [
        TokenizedPair(
            *(answered(json.loads(line), side, number) for side in ("chosen", "rejected"))
        )
        for number, line in enumerate(lines, 1)
    ]
    answers = [(pair.chosen, pair.rejected) for pair in pairs]
    train = TrainSection(
        stage="preference", epochs=1, batch_size=PAIRS_AT_ONCE, learning_rate=LEARNING_RATE
    )
    plan = make_plan(
        [sum(len(each.target_positions) for each in pair) for pair in answers],
        lengths=[sum(len(each.input_ids) for each in pair) for pair in answers],
        token_batch=0,
        batch_size=PAIRS_AT_ONCE,
        accumulation=1,
        epochs=1,
        max_updates=None,
        order="shuffle",
        seed=0,
    )
    model, run_dir = load_lora(folder), RunDir(folder / "ours")
    arguments = make_arguments(
        train,
        folder=run_dir.checkpoints,
        name="dpo",
        num_updates=plan.num_updates,
        seed=0,
        dtype=torch.float32,
    )
    trainer = Trainer(
        model,
        arguments,
        AnswerBatches(plan, ComparedRows(pairs), ComparedRows([]), pad_token_id=0),
        PreferenceObjective(DpoLoss(kind="dpo", beta=BETA), train.spikes),
        Cadence(plan.num_updates),
        run_dir,
    )
    trainer.batches.shares_prompts = shares_prompts and branches_at_a_mask(trainer.model)
    trainer.batches.masked_layout = layout_for(model.config, isolates=True)
    isolates = attend_by_example(trainer.model) or isolates_examples(trainer.model)
    trainer.batches.layout = layout_for(model.config, isolates=isolates)
    print_seconds(trainer.train)


def with_trl(folder: Path) -> None:
    """Train with TRL's DPOTrainer."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PAIRS_AT_ONCE,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print_seconds(trainer.train)


TRAINERS: dict[str, Callable[[Path], None]] = {
    "ours": ours,
    "trl": with_trl,
    "apart": partial(ours, shares_prompts=False),
}


def compare(options: argparse.Namespace) -> None:
    """Run the trainers in turns, and print medians and ratios."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        lengths = {"prompt": options.prompt, "answer": options.answer}
        write_pairs(folder, options.rows, options.vocabulary, **lengths)
        runs = run_in_turns("benchmarks.preference", ("ours", options.beside), folder, options)
    print_runs(runs, options.beside)


def main() -> None:
    """Train, or compare the trainers."""
    parser = parser_of(__doc__, TRAINERS, vocabulary=151_936, repeats=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--beside", choices=("trl", "apart"), default="trl")
    parser.add_argument("--prompt", type=int, default=30, help="median tokens of a prompt")
    parser.add_argument("--answer", type=int, default=90, help="median tokens of an answer")
    options = parser.parse_args()
    if options.train:
        TRAINERS[options.train](options.folder)
    else:
        compare(options)


if __name__ == "__main__":
    main()
