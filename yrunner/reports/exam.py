"""What several models answered, as a page: figures, confusions, and the answers side by side.

The page is one file and asks for nothing. Its one script is named by its hash, so that a browser
runs no other, whatever a model has answered.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

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
    """better or worse where the change is more than chance; it gives the colour."""


@dataclass(frozen=True)
class FigureRow:
    """One figure of all models."""

    group: str
    """The task or side that it belongs to; rows of one group follow each other."""
    figure: str
    reached: Sequence[Reached | None]
    """By model; None where it was not measured."""


@dataclass(frozen=True)
class Confusion:
    """Which label was taken for which."""

    title: str
    labels: Sequence[str]
    """The right ones, one for each row."""
    taken: Sequence[str]
    """The given ones, one for each column."""
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
    """By model: 1 for right, 0 for wrong, or a figure between; None where nobody judged."""


@dataclass(frozen=True)
class TaskAnswers:
    """The answers to one task."""

    name: str
    score: str
    """What the scores are called."""
    rows: Sequence[AnswerRow]

    @property
    def is_graded(self) -> bool:
        """Whether there is nothing but right and wrong."""
        return all(score in (0, 1) for row in self.rows for score in row.scores)


@dataclass(frozen=True)
class Exam:
    """Everything the page shows. The first model is what the others are compared with."""

    title: str
    subtitle: str
    models: Sequence[str]
    judged: int
    """Number of the model whose wrong answers come first."""
    summary: Sequence[FigureRow]
    figures: Sequence[FigureRow]
    confusions: Sequence[Confusion]
    tasks: Sequence[TaskAnswers]
    notes: Sequence[str] = ()


def write_exam(exam: Exam, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_exam(exam))


def render_exam(exam: Exam) -> str:
    """The whole page as text."""
    script = files("yrunner.reports").joinpath("exam.js").read_text("utf-8")
    return render_page(
        "exam.html.jinja",
        exam=exam,
        answers={
            "models": list(exam.models),
            "tasks": [
                {
                    "name": task.name,
                    "score": task.score,
                    "graded": task.is_graded,
                    "rows": [_row(row) for row in task.rows],
                }
                for task in exam.tasks
            ],
        },
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _row(row: AnswerRow) -> list[object]:
    """What the script knows of a question, in the order in which it unpacks it."""
    answers = [printable(answer) for answer in row.answers]
    return [printable(row.question), printable(row.reference), answers, list(row.scores)]
