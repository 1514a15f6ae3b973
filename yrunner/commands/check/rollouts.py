"""Answers of the base to a few prompts: what the rewards say of them, and what a run will take."""

# G = answers to a prompt: a group

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from yrunner.assembly.measure import score_rows
from yrunner.assembly.rl.rollouts import completions_of, score_answers, write_answers
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import reference_in_words
from yrunner.commands.check.signal import MOST_WORK, NotScored, find_base, load_base, spread
from yrunner.console import counted, format_duration, print_table, say, waiting, warn
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.prompts import PromptRow
from yrunner.models.limits import evaluating
from yrunner.recipe.schema.model import AdapterTuning
from yrunner.recipe.schema.rl import PpoLoss
from yrunner.rewards.facts import (
    ENOUGH,
    RewardFacts,
    alarms_of,
    contradictions,
    reward_facts,
    sentences_about,
    short,
)
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.rl.collect import AskedPrompt, WrittenAnswer

SAMPLE_PROMPTS = 8
CHECKING = 2
"""Besides training and validation: these answers draw other random numbers."""
SHOWN_ANSWERS = 3
TRAINING_PER_FORWARD = 3
"""Forward and backward pass take about as long as this many forward passes."""


@dataclass(frozen=True)
class SampledAnswer:
    """An answer of the base, and what each reward says of it."""

    file: str
    row: int
    text: str
    tokens: int
    is_truncated: bool
    rewards: dict[str, float | None]
    reward: float | None


@dataclass(frozen=True)
class RolloutFacts:
    """What the base's answers say about the run."""

    prompts: int
    generations: int
    rewards: list[RewardFacts]
    total: RewardFacts
    truncated: float
    mean_tokens: float
    seconds_per_update: float
    """Writing, judging and learning, at the speed of this machine."""
    seconds: float
    """Of the whole run."""
    sentences: list[str]
    alarms: list[str]
    answers: list[SampledAnswer]


def measure_rollouts(
    run: Run, plan: Plan, rows: int | None, num_ranks: int
) -> RolloutFacts | NotScored:
    """Let the base answer `rows` prompts, each as often as the run will, and judge the answers.

    None: as many prompts as take about half a minute. Raises `YRunnerError` if a reward cannot be
    used, or fails.
    """
    if run.untrained_judges:
        judge, _ = run.untrained_judges[0]
        return NotScored(
            f"the reward model {judge.recipe.name} is not trained or has changed; "
            f"yrun train trains it first"
        )
    rewards = run.load_rewards()
    if rows == 0:
        return NotScored("switched off (--sample 0)")
    base = find_base(run)
    if isinstance(base, NotScored):
        return base
    folder, num_weights = base
    rollout, prompts = run.recipe.rollout, run.prompts.train
    if rows is None:
        rows = _affordable_prompts(run, num_weights)
    if rows == 0:
        return NotScored(
            f"too slow on this machine for a base of {num_weights:,} weights; "
            "let it answer one prompt anyway with --sample 1"
        )
    model = load_base(run.recipe, folder)
    chosen = [row for row in spread(prompts, rows) for _ in range(rollout.generations)]
    asked = [
        AskedPrompt(tuple(row.input_ids), (run.recipe.seed, CHECKING, number))
        for number, row in enumerate(chosen)
    ]
    started = time.perf_counter()
    with evaluating(model), waiting(f"the base writes {counted(len(asked), 'answer')}"):
        answers = write_answers(model, run.tokenizer, rollout, asked)
    assert answers is not None, "nothing interrupts it"
    parts, totals = score_answers(run.tokenizer, rewards, chosen, answers)
    writing = (time.perf_counter() - started) / len(answers)
    learning = TRAINING_PER_FORWARD * _seconds_of_forward(run, model, chosen, answers)
    facts = describe(run, chosen, answers, parts, totals)
    writing *= _written_per_answer(run.recipe.rollout.resample, facts.total.equal_groups)
    seconds = _seconds_per_update(run, plan, writing, learning, num_ranks)
    return replace(facts, seconds_per_update=seconds, seconds=seconds * plan.num_updates)


def _affordable_prompts(run: Run, num_weights: int) -> int:
    rollout = run.recipe.rollout
    tokens = rollout.generations * (
        float(run.prompts.train.lengths.mean()) + rollout.max_new_tokens
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return min(SAMPLE_PROMPTS, int(MOST_WORK[device] / (2 * num_weights * tokens)))


def _seconds_of_forward(
    run: Run, model: Any, rows: Sequence[PromptRow], answers: Sequence[WrittenAnswer]
) -> float:
    """The seconds of a forward pass, per answer."""
    examples = [
        TokenizedExample(
            [*row.input_ids, *answer.ids],
            [*[IGNORE_INDEX] * len(row.input_ids), *answer.ids],
            row.origin,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
    started = time.perf_counter()
    score_rows(run, model, examples, "timing the base on its answers")
    return (time.perf_counter() - started) / len(examples)


def describe(
    run: Run,
    rows: Sequence[PromptRow],
    answers: Sequence[WrittenAnswer],
    parts: Sequence[Sequence[float | None]],
    totals: Sequence[float | None],
) -> RolloutFacts:
    """The facts of answers, those of a prompt side by side; `parts` has the scores of each."""
    recipe = run.recipe
    generations = recipe.rollout.generations
    names = [section.shown_name for section in recipe.rewards]
    columns = [[scores[at] for scores in parts] for at in range(len(names))]
    completions = completions_of(run.tokenizer, rows, answers)
    found = [
        reward_facts(section.shown_name, section.weight, column, generations)
        for section, column in zip(recipe.rewards, columns, strict=True)
    ]
    total = reward_facts("sum", None, totals, generations)
    truncated = sum(it.is_truncated for it in answers) / len(answers)
    alarms = [
        sentence
        for section, facts in zip(recipe.rewards, found, strict=True)
        for sentence in alarms_of(section, facts, completions, totals)
    ]
    alarms += _alarms_of_all(total, truncated) + contradictions(names, columns)
    return RolloutFacts(
        prompts=len(rows) // generations,
        generations=generations,
        rewards=found,
        total=total,
        truncated=truncated,
        mean_tokens=sum(it.num_tokens for it in answers) / len(answers),
        seconds_per_update=0.0,
        seconds=0.0,
        sentences=[
            *(it for facts in found for it in sentences_about(facts, generations)),
            *_about_the_engine(recipe.rollout.engine),
            *_about_resampling(recipe.rollout.resample, total.equal_groups),
        ],
        alarms=alarms,
        answers=[
            SampledAnswer(
                each.origin.file.name,
                each.origin.row,
                each.text,
                each.num_tokens,
                each.is_truncated,
                dict(zip(names, scores, strict=True)),
                sum_,
            )
            for each, scores, sum_ in zip(completions, parts, totals, strict=True)
        ],
    )


def _written_per_answer(rounds: int, equal_groups: float) -> float:
    """Answers that are written for one that is learned from, where others replace equal groups."""
    return sum(equal_groups**number for number in range(rounds + 1))


def _about_resampling(rounds: int, equal_groups: float) -> list[str]:
    if not rounds:
        return []
    more = _written_per_answer(rounds, equal_groups) - 1
    return [
        f"rollout.resample {rounds}: about {more:.0%} more answers are written, and "
        f"{equal_groups ** (rounds + 1):.0%} of the groups stay without two different rewards, if "
        f"they are as often equal as here ({equal_groups:.0%})"
    ]


def _about_the_engine(engine: str) -> list[str]:
    if engine == "transformers":
        return []
    return [f"transformers wrote these answers; how fast {engine} is was not measured"]


def _alarms_of_all(total: RewardFacts, truncated: float) -> list[str]:
    alarms = []
    if total.equal_groups > ENOUGH:
        alarms.append(
            f"{total.equal_groups:.0%} of the groups have equal rewards and would teach nothing: "
            "raise rollout.generations or rollout.temperature, add rewards with part marks (xml, "
            "length), or use other prompts"
        )
    if truncated > ENOUGH:
        alarms.append(
            f"{truncated:.0%} of the answers are cut off: raise rollout.max_new_tokens, or teach "
            "the model to end (train.stage: sft)"
        )
    return alarms


def _seconds_per_update(
    run: Run, plan: Plan, writing: float, learning: float, num_ranks: int
) -> float:
    """An estimate; `writing` and `learning` are seconds per answer."""
    passes = run.recipe.rollout.updates_per_rollout
    has_critic = isinstance(run.recipe.loss, PpoLoss)
    if has_critic and isinstance(run.recipe.tuning, AdapterTuning):
        learning *= 2  # one pass with the policy's adapter, one with the critic's
    # The reference, and the model before a second pass or with its critic, look at each answer.
    looks = (reference_in_words(run.recipe) is not None) + (passes > 1 or has_critic)
    more = looks * learning / TRAINING_PER_FORWARD
    answers = plan.rows_of_an_update * ((writing + more) / passes + learning)
    # A replay row is read by the base, too, and is about as long as an answer with its prompt.
    return (answers + plan.kept * learning) / num_ranks


def print_rollouts(found: RolloutFacts) -> None:
    """Print what the rewards say, what a run takes, and some answers."""
    say("")
    number = counted(found.prompts * found.generations, "answer")
    columns = ("reward", "weight", "answers", "mean", "lowest", "median", "highest", "equal groups")
    print_table(
        f"Rewards of {number} by the base, {found.generations} to a prompt",
        columns,
        [_row(facts) for facts in (*found.rewards, found.total)],
    )
    for sentence in found.sentences:
        say(sentence)
    say(f"answers: {found.mean_tokens:.0f} tokens on average, {found.truncated:.0%} cut off")
    say(
        f"time on this machine: about {format_duration(found.seconds_per_update)} per update, "
        f"{format_duration(found.seconds)} for the run"
    )
    _print_answers(found.answers)
    for alarm in found.alarms:
        warn(alarm)


def _row(facts: RewardFacts) -> tuple[str | int | None, ...]:
    figures = (facts.mean, facts.lowest, facts.median, facts.highest)
    return (
        facts.name,
        None if facts.weight is None else f"{facts.weight:g}",
        facts.answers,
        *(None if figure is None else f"{figure:.3g}" for figure in figures),
        f"{facts.equal_groups:.0%}",
    )


def _print_answers(answers: Sequence[SampledAnswer]) -> None:
    """The best answer, a middling one and the worst."""
    ranked = sorted(answers, key=lambda it: float("-inf") if it.reward is None else -it.reward)
    places = dict.fromkeys(
        round(part * (len(ranked) - 1) / (SHOWN_ANSWERS - 1)) for part in range(SHOWN_ANSWERS)
    )
    for answer in (ranked[at] for at in places):
        parts = ", ".join(f"{name} {_shown(score)}" for name, score in answer.rewards.items())
        cut = ", cut off" * answer.is_truncated
        say(f"{answer.file} row {answer.row}: {_shown(answer.reward)} ({parts}{cut})")
        say(f"  {short(answer.text) or 'nothing'}")


def _shown(score: float | None) -> str:
    return "none" if score is None else f"{score:.3g}"
