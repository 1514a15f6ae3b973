"""Answers that are one of a few labels: which one was given, and how often the right one."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from yrunner.errors import DataError
from yrunner.evaluation.questions import Question
from yrunner.evaluation.text_metrics import contains, is_exact, without_thinking

NO_LABEL = ""
"""For an answer that names no label, or several."""


def labels_of(wanted: Sequence[str], questions: Sequence[Question]) -> list[str]:
    """The labels of a task: `wanted`, or else those of the questions, in order of their text."""
    return list(wanted) or sorted({question.reference.strip() for question in questions})


def check_labels(wanted: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise `DataError` where the data has a label that was not listed, or lacks one that was."""
    labels = labels_of(wanted, questions)
    for question in questions:
        if question.reference.strip() not in labels:
            listed = ", ".join(f'"{label}"' for label in labels)
            raise DataError(
                question.origin,
                f'has the label "{question.reference.strip()}", the task knows only {listed}',
                remedy="correct the row, or add it to labels",
            )
    seen = {question.reference.strip() for question in questions}
    for label in labels:
        if label not in seen:
            raise DataError(
                questions[0].origin.file,
                f'no row has the label "{label}" of the task',
                remedy="correct its spelling, or take it out of labels",
            )
    if len(labels) < 2:
        raise DataError(
            questions[0].origin.file,
            f'every row has the label "{labels[0]}", which leaves nothing to choose',
            remedy="add rows with other labels",
        )


def find_label(answer: str, labels: Sequence[str]) -> str:
    """The label that the answer is; else the only one that it names; else `NO_LABEL`.

    A label inside a longer one that is named ("legal" in "not legal") does not count.
    """
    answer = without_thinking(answer)
    exact = [label for label in labels if is_exact(answer, label)]
    if exact:
        return exact[0]
    named = [label for label in labels if contains(answer, label)]
    longest = [
        label
        for label in named
        if not any(label != other and contains(other, label) for other in named)
    ]
    return longest[0] if len(longest) == 1 else NO_LABEL


def confusion(
    labels: Sequence[str], references: Sequence[str], taken: Sequence[str]
) -> list[list[int]]:
    """How often each label (row) was answered by each label (column); last column: by none."""
    counts = Counter(zip(references, taken, strict=True))
    return [[counts[right, given] for given in (*labels, NO_LABEL)] for right in labels]


def macro_f1(references: Sequence[str], taken: Sequence[str]) -> float:
    """The mean of the labels' F1, each label counting alike, however rare it is."""
    scores = []
    for label in sorted(set(references)):
        hits = sum(right == given == label for right, given in zip(references, taken, strict=True))
        scores.append(2 * hits / (references.count(label) + taken.count(label)))
    return fmean(scores)
