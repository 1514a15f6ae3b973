"""The figures of an evaluation as lines of text, each with its change and a verdict."""

from collections.abc import Iterator, Sequence

from yrunner.console import format_cell
from yrunner.evaluation.results import (
    Difference,
    ModelResults,
    TaskResult,
    differences,
    faults_difference,
    side_difference,
    side_score,
)

BASE, TUNED = "base", "tuned"
"""Names of the recipe's own two models in an evaluation."""

SIDES = {
    "domain": "domain: mean of its tasks",
    "general": "general: the change is forgetting",
    "quality": "quality: mean of its tasks",
}
NO_SHARE = {"loss", "perplexity", "length", "kl", "margin", "reward", "reward_margin"}
"""Figures that are not between 0 and 1."""
SHORTER, LONGER = 0.8, 1.25
"""Share of the first model's length from which on answers are not alike in length."""
Line = tuple[str, str, list[tuple[str, str, str] | None]]
"""Task or side, figure, and by model its value, its change and the verdict on the change."""


def figure_lines(results: Sequence[ModelResults]) -> Iterator[Line]:
    """A line for each figure of each task, then for the text quality of all answers."""
    first = results[0]
    for name, task in first.tasks.items():
        yield from _task_lines(name, task, [model.tasks[name] for model in results])
    if first.quality:
        for figure in first.quality:
            values = [model.quality.get(figure) for model in results]
            yield "all answers", figure, [_reached(figure, value) for value in values]


def summary_lines(results: Sequence[ModelResults]) -> Iterator[Line]:
    """A line for each side, then for the memorised faults."""
    first = results[0]
    for side, meaning in SIDES.items():
        if side_score(first, side) is not None:
            yield (
                "all tasks",
                meaning,
                [
                    _reached(
                        "", side_score(model, side), side_difference([(first, model)], side), number
                    )
                    for number, model in enumerate(results)
                ],
            )
    if first.faults is not None:
        reached = [
            _reached(
                "memorised",
                None if model.faults is None else model.faults.memorised,
                faults_difference([(first, model)]),
                number,
            )
            for number, model in enumerate(results)
        ]
        yield "faulty rows", "memorised", reached
        if first.faults.corrected is not None:
            shares = [model.faults.corrected if model.faults else None for model in results]
            yield "faulty rows", "corrected", [_reached("corrected", share) for share in shares]


def length_notes(results: Sequence[ModelResults]) -> list[str]:
    """A sentence for each task in which a model's answers are much shorter or longer."""
    first, *others = results
    notes = []
    for name, task in first.tasks.items():
        before = task.figures.get("length", 0.0)
        for model in others:
            after = model.tasks[name].figures.get("length")
            if before and after is not None and not SHORTER <= after / before <= LONGER:
                notes.append(
                    f"{name}: the answers of {model.description} have {after / before:.0%} of the "
                    f"length of those of {first.description} ({after:.0f} instead of {before:.0f} "
                    "words or Chinese characters)"
                )
    return notes


def thinking_notes(results: Sequence[ModelResults]) -> list[str]:
    """A sentence for each task in which a model does not come to an answer."""
    return [
        f"{name}: {unfinished_in_words(task.unfinished, len(task.answers), model.description)}"
        for model in results
        for name, task in model.tasks.items()
        if task.unfinished
    ]


def unfinished_in_words(number: int, total: int, model: str) -> str:
    """What answers without an end of their thinking mean, and what to do."""
    return (
        f"{number:,} of {total:,} answers of {model} never end their thinking, and count as wrong. "
        "Raise max_new_tokens, or switch thinking off with model.template_args, such as "
        "{enable_thinking: false}"
    )


def _task_lines(name: str, first: TaskResult, tasks: Sequence[TaskResult]) -> Iterator[Line]:
    changes = [differences(first, task) for task in tasks]
    for figure in dict.fromkeys(figure for task in tasks for figure in task.figures):
        yield (
            name,
            figure,
            [
                _reached(figure, task.figures.get(figure), changes[number].get(figure), number)
                for number, task in enumerate(tasks)
            ],
        )
    if any(task.refused for task in tasks):
        yield name, "too long, skipped", [(str(task.refused), "", "") for task in tasks]
    if any(task.unfinished for task in tasks):
        yield name, "thinking never ends", [(str(task.unfinished), "", "") for task in tasks]


def _reached(
    figure: str, value: float | None, change: Difference | None = None, number: int = 0
) -> tuple[str, str, str] | None:
    if value is None:
        return None
    if not number or change is None:
        return _shown(figure, value), "", ""
    return _shown(figure, value), _shown_change(figure, change), change.verdict(figure)


def _shown(figure: str, value: float) -> str:
    return f"{value:.1%}" if _is_share(figure) else format_cell(value)


def _shown_change(figure: str, change: Difference) -> str:
    """In percentage points where the figure is a share."""
    scale, digits = (100, ".1f") if _is_share(figure) else (1, ".3g")
    text = f"{change.value * scale:+{digits}}"
    if change.low is None or change.high is None:
        return text
    return f"{text} [{change.low * scale:+{digits}}, {change.high * scale:+{digits}}]"


def _is_share(figure: str) -> bool:
    """False for a metric of the harness, which may have any range."""
    return figure not in NO_SHARE and "/" not in figure
