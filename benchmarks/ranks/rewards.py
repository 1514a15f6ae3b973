"""Learning from rewards in `benchmarks.ranks`: prompts, a reward of ids, who writes the answers."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.ranks.cases import (
    MICRO_BATCHES,
    PAD,
    POLICIES,
    TRAIN_ROWS,
    TUNINGS,
    VALIDATION_ROWS,
    VOCABULARY,
    Case,
)
from yrunner.assembly.rl.rollouts import write_answers
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.rollouts import make_rollout_plan
from yrunner.data.conversation import Message, TokenizedExample
from yrunner.data.dataset.prompts import PromptRow
from yrunner.distributed.collectives import num_ranks, this_rank
from yrunner.models.load import load_model, without_zero3
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.recipe.schema.rl import RolloutSection
from yrunner.training.loop import Trainer
from yrunner.training.objective import Objective
from yrunner.training.rl.batches import RolloutBatches
from yrunner.training.rl.collect import Collector, WrittenAnswer, settings_of
from yrunner.training.rl.objective import PolicyObjective

NUM_PROMPTS = 6
ROLLOUT = RolloutSection(
    generations=4, max_new_tokens=6, truncated="keep", updates_per_rollout=2, batch_size=5
)
FIGURES = ("reward", "eval_reward", "answer_tokens")
"""What is compared: a policy's loss is nearly zero, whatever is learned."""
END = 3
"""The id that ends an answer."""


def rollout_plan(case: Case, train: TrainSection) -> Plan:
    """The answers of each update."""
    return make_rollout_plan(
        [len(prompt.input_ids) for prompt in prompts(TRAIN_ROWS[:NUM_PROMPTS])],
        generations=ROLLOUT.generations,
        max_new_tokens=ROLLOUT.max_new_tokens,
        passes=ROLLOUT.updates_per_rollout,
        micro_batch_size=train.batch_size,
        num_micro_batches=MICRO_BATCHES,
        epochs=train.num_epochs,
        max_updates=train.max_steps,
        order=train.order,
        seed=0,
    )


def prompts(examples: Sequence[TokenizedExample]) -> list[PromptRow]:
    """What comes before the targets of random rows."""
    return [
        PromptRow(
            example.input_ids[: example.target_positions[0]],
            (Message("user", f"question {number}"),),
            {},
            example.origin,
        )
        for number, example in enumerate(examples)
    ]


def what_is_rewarded(
    case: Case, train: TrainSection, plan: Plan
) -> tuple[RolloutBatches, Objective]:
    """The answers and the loss of a case."""
    loss = POLICIES[case.loss]
    batches = RolloutBatches(
        plan,
        prompts(TRAIN_ROWS[:NUM_PROMPTS]),
        prompts(VALIDATION_ROWS),
        PAD,
        this_rank(),
        num_ranks(),
        loss=loss,
        rollout=ROLLOUT,
    )
    objective = PolicyObjective(
        loss,
        train.spikes,
        batches.buffer,
        ["even"],
        generations=ROLLOUT.generations,
        temperature=ROLLOUT.temperature,
    )
    return batches, objective


def let_it_write(trainer: Trainer, case: Case, base: Path) -> None:
    """Let the trainer's model write its answers; the base is its reference."""
    batches = trainer.batches
    assert isinstance(batches, RolloutBatches)
    reference = None
    if settings_of(batches.loss).beta and TUNINGS[case.tuning].kind == "full":
        with without_zero3():
            reference = load_model(str(base), dtype=torch.float32).requires_grad_(False).eval()
    batches.collector = Collector(
        trainer.model,
        batches.train.prompts,
        partial(write_answers, trainer.model, _tokenizer(), ROLLOUT),
        _score,
        batches.loss,
        ROLLOUT,
        0,
        PAD,
        max_tokens=64,
        reference=reference,
        whole_model=nullcontext if trainer.zero is None else trainer.zero.whole_model,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t1")),
        pad_token=f"t{PAD}",
        eos_token=f"t{END}",
    )


def _score(
    rows: Sequence[PromptRow], answers: Sequence[WrittenAnswer]
) -> tuple[list[list[float | None]], list[float | None]]:
    """The share of even ids."""
    shares = [sum(token % 2 == 0 for token in each.ids) / len(each.ids) for each in answers]
    return [[share] for share in shares], list(shares)
