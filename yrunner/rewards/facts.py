"""What answers say about a training on rewards: is there anything to learn, and was it learned?"""

# G = answers to a prompt: a group

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rapidfuzz import fuzz

from yrunner.console import counted
from yrunner.data.numbers import last_number
from yrunner.losses.policy import CONTRARY, correlation
from yrunner.recipe.schema.rewards import ExactReward, NumberReward, RewardSection
from yrunner.rewards.completion import Completion

CHOICES_OF_G = (4, 8, 16, 32, 64)
ENOUGH = 0.5
"""Share of groups without variance that a run can live with."""
Scores = Sequence[float | None]
STRETCH = 0.05
"""Share of a run's cycles whose answers tell its beginning, and its end, apart."""
UNBOUNDED = ("reward_model", "python")
"""Kinds of reward without a highest score."""


@dataclass(frozen=True)
class RewardFacts:
    """The scores that one reward gives, or the weighted sum of all."""

    name: str
    weight: float | None
    """None for the sum."""
    answers: int
    """Answers that it has an opinion of."""
    mean: float | None
    lowest: float | None
    median: float | None
    highest: float | None
    equal_groups: float
    """Share of the groups whose answers all have the same score: nothing is learned from them."""
    rate: float | None = None
    """Of a reward that is 0 or 1: the share of ones."""
    expected_equal: float | None = None
    """The share of equal groups to expect at that rate: p^G + (1 - p)^G."""
    advised: int | None = None
    """The fewest answers to a prompt of 4, 8, 16... with which at most half of the groups would be
    equal; None without one."""

    @property
    def is_constant(self) -> bool:
        """Whether all answers have the same score."""
        return self.lowest == self.highest


def reward_facts(name: str, weight: float | None, scores: Scores, generations: int) -> RewardFacts:
    """The facts of scores, those of a group side by side."""
    known = [score for score in scores if score is not None]
    groups = [scores[at : at + generations] for at in range(0, len(scores), generations)]
    equal = fmean([is_equal(group) for group in groups])
    if not known:
        return RewardFacts(name, weight, 0, None, None, None, None, equal)
    figures = (fmean(known), min(known), median(known), max(known))
    facts = RewardFacts(name, weight, len(known), *figures, equal)
    if not {*known} <= {0.0, 1.0}:
        return facts
    rate = fmean(known)
    advised = [size for size in CHOICES_OF_G if equal_share(rate, size) <= ENOUGH]
    expected = equal_share(rate, generations)
    return RewardFacts(
        name, weight, len(known), *figures, equal, rate, expected, advised[0] if advised else None
    )


def is_equal(group: Scores) -> bool:
    """Whether all answers that have a score have the same; also for a group without any."""
    return len({score for score in group if score is not None}) < 2


def equal_share(rate: float, generations: int) -> float:
    """The share of groups without variance, of a reward that an answer gets with this rate."""
    return float(rate**generations + (1 - rate) ** generations)


def sentences_about(facts: RewardFacts, generations: int) -> list[str]:
    """What the scores of a reward mean for the training, if that is not obvious."""
    if facts.rate is None or facts.expected_equal is None or facts.is_constant:
        return []
    found = (
        f"{facts.name}: {facts.rate:.0%} of the answers get it. Of groups of {generations}, "
        f"{facts.expected_equal:.0%} would be all alike and teach nothing"
    )
    if facts.expected_equal <= ENOUGH:
        return [found]
    if facts.advised is None:
        hard = facts.rate < 0.5
        return [f"{found}; use {'easier' if hard else 'harder'} prompts"]
    share = equal_share(facts.rate, facts.advised)
    return [f"{found}; with rollout.generations {facts.advised} it would be {share:.0%}"]


def alarms_of(
    section: RewardSection, facts: RewardFacts, completions: Sequence[Completion], totals: Scores
) -> list[str]:
    """Sentences about a reward that tells the answers not apart."""
    number = counted(len(completions), "answer")
    if not facts.answers:
        return [f"{facts.name}: had no opinion of any of {number}"]
    if not facts.is_constant or len(completions) < 2:
        return []
    if facts.highest != 0:
        return [
            f"{facts.name}: is {facts.highest:g} for each of {number}: nothing is learned of it"
        ]
    at = nearest(section, completions, totals)
    right = _right(section, completions[at])
    wanted = "" if right is None else f', and right is "{short(right)}"'
    return [
        f"{facts.name}: never matched in {number}; the nearest was "
        f'"{short(completions[at].text)}" to {completions[at].origin}{wanted}. A reward that never '
        "matches teaches nothing: check its settings against that answer, or begin with examples "
        "(train.stage: sft)"
    ]


def nearest(section: RewardSection, completions: Sequence[Completion], totals: Scores) -> int:
    """The answer that is nearest to what a reward wants, of answers that do not have it."""
    if isinstance(section, NumberReward):
        distances = [_distance(section, each) for each in completions]
        found = [at for at, distance in enumerate(distances) if distance is not None]
        if found:
            return min(found, key=lambda at: distances[at] or 0.0)
    if isinstance(section, ExactReward):
        likeness = [
            fuzz.partial_ratio(_right(section, each) or "", each.text) * bool(each.text)
            for each in completions
        ]
        return likeness.index(max(likeness))
    sums = [float("-inf") if total is None else total for total in totals]
    return sums.index(max(sums))


def _distance(section: NumberReward, completion: Completion) -> float | None:
    given, right = last_number(completion.text), last_number(completion.columns[section.column])
    return None if given is None or right is None else float(abs(given - right))


def _right(section: RewardSection, completion: Completion) -> str | None:
    if not isinstance(section, (ExactReward, NumberReward)):
        return None
    value = completion.columns[section.column]
    return str(value[0] if isinstance(value, list) and value else value)


def contradictions(names: Sequence[str], parts: Sequence[Scores]) -> list[str]:
    """Pairs of rewards that fall where the other rises: a correlation below -0.3."""
    found = []
    for one in range(len(names)):
        for other in range(one + 1, len(names)):
            value = correlation(parts[one], parts[other])
            if value is not None and value < CONTRARY:
                found.append(
                    f"the rewards {names[one]} and {names[other]} contradict each other "
                    f"(correlation {value:+.2f}): lower the weight of one, or combine them"
                )
    return found


def short(text: str, limit: int = 160) -> str:
    """A text on one line; a long one has its middle left out."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    half = (limit - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


@dataclass(frozen=True)
class Drawn:
    """The answers that a run drew in a stretch of its cycles, or the mean of several such runs."""

    answers: int
    reward: float | None
    """Their mean reward: the weighted sum, less the penalty for answers that are cut off."""
    means: dict[str, float]
    """The mean score of each reward that had an opinion."""
    whole: dict[str, float]
    """The share of full marks, for each reward that has any."""


def first_and_last(
    rollouts: Sequence[Mapping[str, Any]], rewards: Sequence[RewardSection]
) -> tuple[Drawn, Drawn] | None:
    """What a run drew in its first and in its last twentieth of the cycles, at least one each.

    `rollouts`: lines of rollouts.jsonl. Answers that others have replaced count: they were drawn.
    None before there are two cycles.
    """
    cycles = sorted({line["cycle"] for line in rollouts})
    if len(cycles) < 2:
        return None
    number = max(1, round(STRETCH * len(cycles)))
    first, last = (
        _drawn([line for line in rollouts if line["cycle"] in chosen], rewards)
        for chosen in (set(cycles[:number]), set(cycles[-number:]))
    )
    return first, last


def _drawn(lines: Sequence[Mapping[str, Any]], rewards: Sequence[RewardSection]) -> Drawn:
    totals = [line["reward"] for line in lines if line["reward"] is not None]
    means, whole = {}, {}
    for section in rewards:
        name = section.shown_name
        scores = [line["rewards"][name] for line in lines]
        known = [score for score in scores if score is not None]
        if known:
            means[name] = fmean(known)
            if section.kind not in UNBOUNDED:
                whole[name] = fmean(score >= 1 for score in known)
    return Drawn(len(lines), fmean(totals) if totals else None, means, whole)
