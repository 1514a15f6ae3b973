"""An evaluation as a page: figures, confusion matrices, and all models' answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yrunner.console import printable
from yrunner.reports.html import render_page
from yrunner.storage.run_dir import write_text


@dataclass(frozen=True)
class Reached:
    """What one model reached in a figure."""

    value: str
    change: str = ""
    """Against the first model, with its interval."""
    verdict: str = ""
    """better or worse where the change is significant; it gives the colour."""


@dataclass(frozen=True)
class FigureRow:
    """One figure of all models."""

    group: str
    """The task or side that it belongs to; rows of a group are adjacent."""
    figure: str
    reached: Sequence[Reached | None]
    """By model; None where it was not measured."""


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix."""

    title: str
    labels: Sequence[str]
    """The right labels, one per row."""
    taken: Sequence[str]
    """The answered labels, one per column."""
    counts: Sequence[Sequence[int]]

    def share(self, row: int, column: int) -> float:
        """The share of the row's questions that got the column's label."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


@dataclass(frozen=True)
class AnswerRow:
    """A question with the answers of all models."""

    question: str
    reference: str
    answers: Sequence[str]
    scores: Sequence[float | None]
    """By model: 1 for right, 0 for wrong, or a figure between; None where it was not scored."""


@dataclass(frozen=True)
class TaskAnswers:
    """The answers to one task."""

    name: str
    score: str
    """Name of the scores."""
    rows: Sequence[AnswerRow]

    @property
    def is_graded(self) -> bool:
        """Whether every answer is either right or wrong."""
        return all(score in (0, 1) for row in self.rows for score in row.scores)


@dataclass(frozen=True)
class EvalPage:
    """Everything the page shows. The others are compared with the first model."""

    title: str
    subtitle: str
    models: Sequence[str]
    judged: int
    """Index of the model whose wrong answers come first."""
    summary: Sequence[FigureRow]
    figures: Sequence[FigureRow]
    confusions: Sequence[Confusion]
    tasks: Sequence[TaskAnswers]
    notes: Sequence[str] = ()


def write_eval_page(page: EvalPage, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_eval_page(page))


def render_eval_page(page: EvalPage) -> str:
    """The whole page as text."""
    return render_page(
        "eval_page.html.jinja",
        scripts=["eval_page.js"],
        page=page,
        answers={
            "models": list(page.models),
            "tasks": [
                {
                    "name": task.name,
                    "score": task.score,
                    "graded": task.is_graded,
                    "rows": [_row(row) for row in task.rows],
                }
                for task in page.tasks
            ],
        },
    )


def _row(row: AnswerRow) -> list[object]:
    """A question for the script, in the order in which the script unpacks it."""
    answers = [printable(answer) for answer in row.answers]
    return [printable(row.question), printable(row.reference), answers, list(row.scores)]
