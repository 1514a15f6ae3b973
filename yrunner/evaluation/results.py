"""What models reached in the tasks, and how they differ, with a paired bootstrap interval."""

# B = resamples, S = seeds, Q = questions of a task

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np

from yrunner.data.text_metrics import at_equal_length, text_quality
from yrunner.recipe.schema.eval import Side

NUM_RESAMPLES = 2_000
NUM_BLOCKS = 16
SHARE_INSIDE = 0.95
LOWER_IS_BETTER = {
    "loss",
    "perplexity",
    "repetition_3",
    "repetition_4",
    "windowed_repetition",
    "memorised",
}
NEITHER_IS_BETTER = {"length", "never_stopped", "density", "distinct_1", "distinct_2", "kl"}
"""Figures that can be too high and too low, or that short answers alone improve."""
AT_EQUAL_LENGTH = {
    "unrepeated",
    "repetition_3",
    "repetition_4",
    "windowed_repetition",
    "distinct_1",
    "distinct_2",
    "density",
}
"""Figures that depend on the length of a text: whoever writes less repeats less."""
ScorePair = tuple[Sequence[float], Sequence[float]]
"""The scores of two models in the questions of one task: before and after, or one and the other."""


@dataclass(frozen=True)
class TaskResult:
    """What one model reached in one task."""

    side: Side
    kind: str
    headline: str
    """Name of the main figure; more is better."""
    figures: dict[str, float]
    per_question: dict[str, list[float]]
    """The same for each question, for the figures that are means over questions."""
    answers: list[str] = field(default_factory=list)
    """The answers, labels or choices of the model; empty for perplexity."""
    refused: int = 0
    """Questions too long for the model: not asked, and counted as wrong."""
    unfinished: int = 0
    """Answers whose thinking never ends: counted as wrong."""


@dataclass(frozen=True)
class Faults:
    """How many faulty training rows a model repeats."""

    memorised: float
    """Share of the rows whose faulty answer it gives word for word."""
    per_row: list[float]
    """1 for a row that it repeats, in the order of the list."""
    by_kind: dict[str, float]
    """The share among the rows of each kind of fault."""
    answers: list[str]
    corrected: float | None = None
    """Share answered rightly, among the rows whose right answer is listed; None without any."""


@dataclass(frozen=True)
class ModelResults:
    """What one model reached in all tasks."""

    description: str
    """Name of the model in tables."""
    tasks: dict[str, TaskResult]
    """By the name of the task."""
    quality: dict[str, float] = field(default_factory=dict)
    """Means over all answers, see `text_quality`."""
    faults: Faults | None = None

    def to_json(self) -> dict[str, Any]:
        """For `eval.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelResults":
        """Read what `to_json` gave; unknown keys of later versions are ignored."""
        faults = content.get("faults")
        return cls(
            description=content["description"],
            tasks={
                name: TaskResult(**_known(TaskResult, task))
                for name, task in content["tasks"].items()
            },
            quality=content["quality"],
            faults=Faults(**_known(Faults, faults)) if faults else None,
        )


ModelPairs = Sequence[tuple[ModelResults, ModelResults]]
"""Models to compare: base and tuned, or two arms with one pair per seed."""


@dataclass(frozen=True)
class Difference:
    """The difference of two models in a figure."""

    value: float
    low: float | None = None
    """Bounds of its 95 % interval; None where the figure is not a mean over questions."""
    high: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether it may be chance: the interval contains 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def as_json(self) -> dict[str, float | None]:
        """For `eval.json` and `compare.json`."""
        return {"difference": self.value, "low": self.low, "high": self.high}

    def verdict(self, figure: str) -> str:
        """better, worse, or empty where it may be chance or is neither."""
        if self.is_noise or figure in NEITHER_IS_BETTER:
            return ""
        return "better" if (self.value > 0) != (figure in LOWER_IS_BETTER) else "worse"


def differences(before: TaskResult, after: TaskResult) -> dict[str, Difference]:
    """`after` minus `before` in each figure; both answered the same questions."""
    found = {}
    cut = _at_equal_length(before, after)
    for figure in after.figures:
        if figure not in before.figures:
            continue
        pair = cut.get(figure)
        if pair is None:
            values = before.figures[figure], after.figures[figure]
            pair = before.per_question.get(figure, []), after.per_question.get(figure, [])
        else:
            values = fmean(pair[0]), fmean(pair[1])
        found[figure] = _difference([values], [[pair]])
    return found


def _at_equal_length(before: TaskResult, after: TaskResult) -> dict[str, ScorePair]:
    """The text quality of both in each question, with both answers cut to the shorter one.

    Empty for tasks that do not measure it.
    """
    if before.kind != "quality" or not before.answers or not after.answers:
        return {}
    pairs = [at_equal_length(*both) for both in zip(before.answers, after.answers, strict=True)]
    first, second = (by_figure([text_quality(pair[side]) for pair in pairs]) for side in (0, 1))
    found: dict[str, ScorePair] = {
        figure: (first[figure], second[figure]) for figure in AT_EQUAL_LENGTH & first.keys()
    }
    repeated = found["repetition_4"]
    unrepeated = [[1 - share for share in shares] for shares in repeated]
    return found | {"unrepeated": (unrepeated[0], unrepeated[1])}


def side_score(results: ModelResults, side: str) -> float | None:
    """The mean of the main figures of a side's tasks; None for a side without tasks."""
    headlines = [
        task.figures[task.headline] for task in results.tasks.values() if task.side == side
    ]
    return fmean(headlines) if headlines else None


def side_difference(pairs: ModelPairs, side: str) -> Difference | None:
    """The mean difference of the scores of a side; None where a model has no score."""
    if any(side_score(model, side) is None for pair in pairs for model in pair):
        return None
    first, last = pairs[0]
    names = [name for name, task in last.tasks.items() if task.side == side and name in first.tasks]
    if not names:
        return None
    changes = [
        [_headline_pair(before.tasks[name], after.tasks[name]) for before, after in pairs]
        for name in names
    ]
    means = [
        (fmean(task[seed][0][0] for task in changes), fmean(task[seed][0][1] for task in changes))
        for seed in range(len(pairs))
    ]
    return _difference(means, [[pair for _, pair in task] for task in changes])


def faults_difference(pairs: ModelPairs) -> Difference | None:
    """The mean difference of memorised faults; None where a model was not asked for them."""
    faults = [(before.faults, after.faults) for before, after in pairs]
    known = [(then, now) for then, now in faults if then is not None and now is not None]
    if not known or len(known) < len(faults):
        return None
    return _difference(
        [(then.memorised, now.memorised) for then, now in known],
        [[(then.per_row, now.per_row) for then, now in known]],
    )


def by_figure(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """One list per figure, from one mapping per question; all have the same figures."""
    return {figure: [row[figure] for row in rows] for figure in (rows[0] if rows else ())}


def mean_figures(per_question: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each figure over the questions."""
    return {figure: fmean(values) for figure, values in per_question.items()}


def _difference(
    values: Sequence[tuple[float, float]], tasks: Sequence[Sequence[ScorePair]]
) -> Difference:
    """The mean difference of `values`, with an interval where they are means over questions."""
    value = fmean(after - before for before, after in values)
    pairs = [pair for task in tasks for pair in task]
    if not all(before and len(before) == len(after) for before, after in pairs):
        return Difference(value)
    return Difference(value, *interval_of_means(tasks))


def interval_of_means(
    tasks: Sequence[Sequence[ScorePair]], *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of `after` minus `before`, with one pair per seed.

    Paired bootstrap (Efron, 1979): seeds, and the questions within each task, are resampled with
    replacement, the same for both models of a pair. So the interval covers other seeds and other
    questions of the same kind; with one seed, only other questions. `seed` decides the draws.
    """
    generator = np.random.default_rng(seed)
    num_seeds = len(tasks[0])
    seeds_BS = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, NUM_RESAMPLES)
    total_B = np.zeros(NUM_RESAMPLES)
    for pairs in tasks:
        change_SQ = np.array([after for _, after in pairs], float)
        change_SQ -= np.array([before for before, _ in pairs], float)
        assert change_SQ.size > 0, "at least one question"
        # In blocks: a benchmark may have thousands of questions.
        blocks = np.array_split(seeds_BS / num_seeds, NUM_BLOCKS)
        total_B += np.concatenate([_resample(generator, block, change_SQ) for block in blocks])
    outside = (1 - SHARE_INSIDE) / 2
    low, high = np.quantile(total_B / len(tasks), (outside, 1 - outside))
    return float(low), float(high)


def _resample(
    generator: np.random.Generator, seeds_BS: np.ndarray, change_SQ: np.ndarray
) -> np.ndarray:
    """The mean change in each resample; each row of `seeds_BS` has the shares of the seeds."""
    num_questions = change_SQ.shape[1]
    questions_BQ = generator.integers(num_questions, size=(len(seeds_BS), num_questions))
    return np.take_along_axis(seeds_BS @ change_SQ, questions_BQ, axis=1).mean(axis=1)


def _headline_pair(before: TaskResult, after: TaskResult) -> tuple[tuple[float, float], ScorePair]:
    """The main figure of both, and that of each question; text quality at equal length."""
    figure = after.headline
    pair = _at_equal_length(before, after).get(figure)
    if pair is not None:
        return (fmean(pair[0]), fmean(pair[1])), pair
    pair = before.per_question.get(figure, []), after.per_question.get(figure, [])
    return (before.figures[figure], after.figures[figure]), pair


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {part.name for part in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
