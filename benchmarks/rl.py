"""How fast is GRPO with LoRA, compared with TRL, and how much memory does it take?

    python -m benchmarks.rl [--vocabulary 6400] [--updates 4] [--trl PYTHON]
    python -m benchmarks.rl --writing

Trains LoRA of rank 16 on all linear layers in float32, from a Qwen3 model of random weights: eight
prompts of 4 to 60 tokens per update, eight answers of up to 64 tokens to each, written by
transformers; no KL. The reward is the share of even words. Each trainer runs in a separate process,
in turns, on the same model and the same prompts. Reports the time per update, writing and learning
together, and the peak memory of the process. `--trl` takes the Python of an environment with TRL;
default this one. `--writing` compares the writing of 64 answers at once with one by one, in seconds
of processor time, and checks that the answers are the same.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.in_turns import parser_of, print_runs, print_seconds, run_in_turns
from benchmarks.sft.inputs import SPECIAL_TOKENS, save_model

PROMPTS_AT_ONCE, GENERATIONS, ANSWER_TOKENS = 8, 8, 64
MICRO_BATCH = 16
LEARNING_RATE = 1e-4


def write_prompts(folder: Path, number: int, vocabulary_size: int) -> None:
    """Write prompts of random tokens; every trainer reads a word as a token id."""
    chance = random.Random(0)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(number):
            length = min(60, max(4, round(chance.lognormvariate(3.4, 0.4))))
            ids = (chance.randrange(len(SPECIAL_TOKENS), vocabulary_size) for _ in range(length))
            file.write(json.dumps({"prompt": " ".join(map(str, ids))}) + "\n")


def share_of_even_words(text: str) -> float:
    """The reward."""
    words = [int(word) for word in text.split() if word.isdecimal()]
    return sum(word % 2 == 0 for word in words) / max(1, len(words))


def ours(folder: Path) -> None:
    """Train as `yrun train` does, in the batch layout that it chooses."""
    import torch

    from benchmarks.sft.ours import load_lora
    from yrunner.assembly.rl.rollouts import write_answers
    from yrunner.assembly.trainer import layout_for
    from yrunner.data.batching.rollouts import make_rollout_plan
    from yrunner.data.dataset.prompts import PromptRow
    from yrunner.errors import Origin
    from yrunner.models.layers.example_attention import attend_by_example
    from yrunner.models.limits import isolates_examples
    from yrunner.models.load import load_tokenizer
    from yrunner.recipe.schema.recipe import TrainSection
    from yrunner.recipe.schema.rl import GrpoLoss, RolloutSection
    from yrunner.storage.run_dir import RunDir
    from yrunner.training.arguments import make_arguments
    from yrunner.training.callbacks import Cadence
    from yrunner.training.loop import Trainer
    from yrunner.training.rl.batches import RolloutBatches
    from yrunner.training.rl.collect import Collector, WrittenAnswer
    from yrunner.training.rl.objective import PolicyObjective

    lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts = [
        PromptRow(list(map(int, json.loads(line)["prompt"].split())), (), {}, Origin(folder, row))
        for row, line in enumerate(lines, 1)
    ]
    loss = GrpoLoss(kind="grpo", beta=0.0)
    rollout = RolloutSection(
        generations=GENERATIONS, max_new_tokens=ANSWER_TOKENS, truncated="keep"
    )
    accumulation = PROMPTS_AT_ONCE * GENERATIONS // MICRO_BATCH
    train = TrainSection(
        stage="rl",
        epochs=1,
        batch_size=MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        learning_rate=LEARNING_RATE,
    )
    plan = make_rollout_plan(
        [len(prompt.input_ids) for prompt in prompts],
        generations=GENERATIONS,
        max_new_tokens=ANSWER_TOKENS,
        passes=1,
        micro_batch_size=MICRO_BATCH,
        num_micro_batches=accumulation,
        epochs=1,
        order="shuffle",
        seed=0,
    )
    model, run_dir = load_lora(folder), RunDir(folder / "ours")
    tokenizer = load_tokenizer(str(folder / "model"))
    batches = RolloutBatches(plan, prompts, [], 0, loss=loss, rollout=rollout)
    trainer = Trainer(
        model,
        make_arguments(
            train,
            folder=run_dir.checkpoints,
            name="grpo",
            num_updates=plan.num_updates,
            seed=0,
            dtype=torch.float32,
        ),
        batches,
        PolicyObjective(
            loss, train.spikes, batches.buffer, ["even"], generations=GENERATIONS, temperature=1.0
        ),
        Cadence(plan.num_updates),
        run_dir,
    )

    def score(_: Any, answers: Sequence[WrittenAnswer]) -> Any:
        rewards = [share_of_even_words(answer.text) for answer in answers]
        return [[reward] for reward in rewards], rewards

    batches.collector = Collector(
        trainer.model,
        partial(write_answers, trainer.model, tokenizer, rollout),
        score,
        loss,
        rollout,
        seed=0,
        pad_token_id=0,
        max_tokens=4096,
    )
    isolates = attend_by_example(trainer.model) or isolates_examples(trainer.model)
    batches.layout = layout_for(model.config, isolates=isolates)
    print_seconds(trainer.train)


def with_trl(folder: Path) -> None:
    """Train with TRL's GRPOTrainer."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def even_words(completions: list[str], **_: Any) -> list[float]:
        return [share_of_even_words(text) for text in completions]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS_AT_ONCE * GENERATIONS // MICRO_BATCH,
        num_generations=GENERATIONS,
        max_completion_length=ANSWER_TOKENS,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        beta=0.0,
        loss_type="grpo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=even_words,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print_seconds(trainer.train)


TRAINERS: dict[str, Callable[[Path], None]] = {"ours": ours, "trl": with_trl}


def compare_writing(options: argparse.Namespace) -> None:
    """Write the answers of an update at once and one by one, in turns."""
    from benchmarks.sft.ours import load_lora
    from yrunner.assembly.rl.rollouts import write_answers
    from yrunner.models.limits import evaluating
    from yrunner.models.load import load_tokenizer
    from yrunner.recipe.schema.rl import RolloutSection
    from yrunner.training.rl.collect import AskedPrompt

    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        write_prompts(folder, PROMPTS_AT_ONCE, options.vocabulary)
        model, tokenizer = load_lora(folder), load_tokenizer(str(folder / "model"))
        lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts = [tuple(map(int, json.loads(line)["prompt"].split())) for line in lines]
    asked = [
        AskedPrompt(ids, (0, place, number))
        for place, ids in enumerate(prompts)
        for number in range(GENERATIONS)
    ]
    found: dict[int, list[float]] = {len(asked): [], 1: []}
    texts = set()
    for _ in range(options.repeats):
        for size, seconds in found.items():
            rollout = RolloutSection(max_new_tokens=ANSWER_TOKENS, batch_size=size)
            started = time.process_time()
            with evaluating(model):
                answers = write_answers(model, tokenizer, rollout, asked)
            seconds.append(time.process_time() - started)
            texts.add(tuple(answer.text for answer in answers or ()))
    assert len(texts) == 1, "the batch changes the answers"
    at_once, one_by_one = (statistics.median(seconds) for seconds in found.values())
    print(f"{len(asked)} answers at once: {at_once:.2f} s, one by one: {one_by_one:.2f} s")
    print(f"one by one / at once: {one_by_one / at_once:.1f}")


def compare(options: argparse.Namespace) -> None:
    """Run the trainers in turns, and print medians and ratios."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        write_prompts(folder, options.updates * PROMPTS_AT_ONCE, options.vocabulary)
        runs = run_in_turns("benchmarks.rl", TRAINERS, folder, options)
    print_runs(runs, "trl", updates=options.updates)


def main() -> None:
    """Train, or compare the trainers."""
    parser = parser_of(__doc__, TRAINERS, vocabulary=6_400, repeats=2)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--writing", action="store_true")
    options = parser.parse_args()
    if options.writing:
        compare_writing(options)
    elif options.train:
        TRAINERS[options.train](options.folder)
    else:
        compare(options)


if __name__ == "__main__":
    main()
