"""How far a difference between models may be chance: the paired bootstrap.

One pair of models is the case of one seed; `yrun compare` has a pair for each seed.

How a model did: figures of every task, and what they were computed from.
"""

# B = resamples, S = seeds, Q = questions of a task

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np

from yrunner.recipe.schema.eval import Side

NUM_RESAMPLES = 2_000
NUM_BLOCKS = 16
SHARE_INSIDE = 0.95

ScorePair = tuple[Sequence[float], Sequence[float]]
"""What two models reached in the questions of one task: before and after, or one and the other."""


def interval_of_means(
    tasks: Sequence[Sequence[ScorePair]], *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of `after` minus `before`, in a pair for each seed.

    Seeds, and the questions of each task among themselves, are drawn anew with replacement, the
    same for both models of a pair; the interval holds the middle of the mean differences (Efron,
    1979). So it says what other seeds and other questions of the same kind would give; with one
    seed it speaks of the questions alone. The draws hang on `seed`.
    """
    generator = np.random.default_rng(seed)
    num_seeds = len(tasks[0])
    seeds_BS = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, NUM_RESAMPLES)
    total_B = np.zeros(NUM_RESAMPLES)
    for pairs in tasks:
        change_SQ = np.array([after for _, after in pairs], float)
        change_SQ -= np.array([before for before, _ in pairs], float)
        assert change_SQ.size > 0, "at least one question"
        # In blocks, since a task of a benchmark may have thousands of questions.
        blocks = np.array_split(seeds_BS / num_seeds, NUM_BLOCKS)
        total_B += np.concatenate([_drawn(generator, block, change_SQ) for block in blocks])
    outside = (1 - SHARE_INSIDE) / 2
    low, high = np.quantile(total_B / len(tasks), (outside, 1 - outside))
    return float(low), float(high)


def _drawn(
    generator: np.random.Generator, seeds_BS: np.ndarray, change_SQ: np.ndarray
) -> np.ndarray:
    """The mean change in each resample, of which each row of `seeds_BS` has the shares of seeds."""
    num_questions = change_SQ.shape[1]
    questions_BQ = generator.integers(num_questions, size=(len(seeds_BS), num_questions))
    return np.take_along_axis(seeds_BS @ change_SQ, questions_BQ, axis=1).mean(axis=1)


LOWER_IS_BETTER = {
    "loss",
    "perplexity",
    "repetition_3",
    "repetition_4",
    "windowed_repetition",
    "never_stopped",
    "memorised",
}
NEITHER_IS_BETTER = {"length", "density", "distinct_1", "distinct_2"}
"""What can be too high and too low."""


@dataclass(frozen=True)
class TaskResult:
    """What one model reached in one task."""

    side: Side
    kind: str
    headline: str
    """Name of the main figure, of which more is better."""
    figures: dict[str, float]
    per_question: dict[str, list[float]]
    """The same for each question, for the figures that are means over questions."""
    answers: list[str] = field(default_factory=list)
    """What the model answered, or which label or choice it took; empty where it only read."""
    refused: int = 0
    """Questions too long for the model: they were not asked, and count as wrong."""


@dataclass(frozen=True)
class Faults:
    """Which of the rows that are known to be wrong a model repeats."""

    memorised: float
    """Share of the rows whose faulty answer it gives, word by word."""
    per_row: list[float]
    """1 for a row that it repeats, in the order of the list."""
    by_kind: dict[str, float]
    """The share among the rows of each kind of fault."""
    answers: list[str]
    corrected: float | None = None
    """Share of the rows that it answers rightly all the same, among those whose right answer the
    list holds; None where it holds none."""


@dataclass(frozen=True)
class ModelResults:
    """What one model reached in all tasks."""

    description: str
    """What the model is called beside others."""
    tasks: dict[str, TaskResult]
    """By the name of the task."""
    quality: dict[str, float] = field(default_factory=dict)
    """Means over everything that it wrote; see text_quality.py."""
    faults: Faults | None = None

    def to_json(self) -> dict[str, Any]:
        """For `eval.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelResults":
        """Read what `to_json` gave; keys that a later version added are left out."""
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
"""Models to be told apart: a base and what was made of it, or two arms with each of some seeds."""


@dataclass(frozen=True)
class Difference:
    """How far one model lies from another in a figure."""

    value: float
    low: float | None = None
    """Ends of its 95 % interval; None where the figure is no mean over questions."""
    high: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether it may be chance: the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def as_json(self) -> dict[str, float | None]:
        """For `eval.json` and `compare.json`."""
        return {"difference": self.value, "low": self.low, "high": self.high}

    def verdict(self, figure: str) -> str:
        """better, worse, or nothing where it may be chance or is neither."""
        if self.is_noise or figure in NEITHER_IS_BETTER:
            return ""
        return "better" if (self.value > 0) != (figure in LOWER_IS_BETTER) else "worse"


def differences(before: TaskResult, after: TaskResult) -> dict[str, Difference]:
    """Each figure of `after` against `before`, which answered the same questions."""
    return {
        figure: _difference(
            [(before.figures[figure], after.figures[figure])],
            [[(before.per_question.get(figure, []), after.per_question.get(figure, []))]],
        )
        for figure in after.figures
        if figure in before.figures
    }


def side_score(results: ModelResults, side: str) -> float | None:
    """The mean of the main figures of a side's tasks; None where it has none."""
    headlines = [
        task.figures[task.headline] for task in results.tasks.values() if task.side == side
    ]
    return fmean(headlines) if headlines else None


def side_difference(pairs: ModelPairs, side: str) -> Difference | None:
    """How far the scores of a side differ, mean over the pairs; None where a model has none."""
    scores = [(side_score(before, side), side_score(after, side)) for before, after in pairs]
    known = [(then, now) for then, now in scores if then is not None and now is not None]
    if not known or len(known) < len(scores):
        return None
    first, last = pairs[0]
    names = [name for name, task in last.tasks.items() if task.side == side and name in first.tasks]
    tasks = [
        [(_headline(before.tasks[name]), _headline(after.tasks[name])) for before, after in pairs]
        for name in names
    ]
    return _difference(known, tasks)


def faults_difference(pairs: ModelPairs) -> Difference | None:
    """How far the shares of memorised faults differ; None where nobody looked for them."""
    faults = [(before.faults, after.faults) for before, after in pairs]
    known = [(then, now) for then, now in faults if then is not None and now is not None]
    if not known or len(known) < len(faults):
        return None
    return _difference(
        [(then.memorised, now.memorised) for then, now in known],
        [[(then.per_row, now.per_row) for then, now in known]],
    )


def by_figure(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The figures of each question as one list for each figure; all questions have the same."""
    return {figure: [row[figure] for row in rows] for figure in (rows[0] if rows else ())}


def mean_figures(per_question: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each figure over the questions."""
    return {figure: fmean(values) for figure, values in per_question.items()}


def _difference(
    values: Sequence[tuple[float, float]], tasks: Sequence[Sequence[ScorePair]]
) -> Difference:
    """The mean difference of the values, and its interval where they are means over questions."""
    value = fmean(after - before for before, after in values)
    pairs = [pair for task in tasks for pair in task]
    if not all(before and len(before) == len(after) for before, after in pairs):
        return Difference(value)
    return Difference(value, *interval_of_means(tasks))


def _headline(task: TaskResult) -> list[float]:
    return task.per_question.get(task.headline, [])


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {part.name for part in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
