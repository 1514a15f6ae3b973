"""The results of an evaluation: a table, eval.json and eval.html."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from yrunner.assembly.identity import describe_device, describe_environment
from yrunner.console import Cell, print_table, say
from yrunner.evaluation.figure_lines import (
    SIDES,
    Line,
    figure_lines,
    length_notes,
    summary_lines,
    thinking_notes,
)
from yrunner.evaluation.memorised_faults import KnownFault
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import (
    Difference,
    ModelResults,
    differences,
    faults_difference,
    side_difference,
)
from yrunner.evaluation.scorers import confusion, labels_of
from yrunner.recipe.schema.eval import ClassifyTask, QualityTask, Task
from yrunner.recipe.schema.recipe import Recipe
from yrunner.reports.eval_page import (
    AnswerRow,
    Confusion,
    EvalPage,
    FigureRow,
    Reached,
    TaskAnswers,
    write_eval_page,
)

Tasks = Sequence[tuple[Task, list[Question]]]

STYLES = {"better": "green", "worse": "red", "": "dim"}
AT_EQUAL_LENGTH = (
    "Changes in text quality compare the answers to each question at equal length, both cut to the "
    "shorter one, because whoever writes less repeats less."
)
NOTES = (
    "A change is relative to the first model. In brackets: its 95 % confidence interval, from "
    "resampling the questions two thousand times; a change is coloured only if that interval "
    "excludes zero.",
    AT_EQUAL_LENGTH,
)


def print_results(tasks: Tasks, results: Sequence[ModelResults]) -> None:
    """Print all figures with their differences to the first model."""
    columns = ["task", "figure"]
    for number, model in enumerate(results):
        columns += [model.description, "change [95 %]"] if number else [model.description]
    rows: list[list[Cell | Text]] = []
    for group, figure, reached in [*figure_lines(results), *summary_lines(results)]:
        cells: list[Cell | Text] = [group, figure]
        for number, part in enumerate(reached):
            value, change, verdict = part or ("–", "", "")
            cells += [value, Text(change, STYLES[verdict])] if number else [value]
        rows.append(cells)
    print_table("Figures", columns, rows)
    if len(results) > 1 and any(isinstance(task, QualityTask) for task, _ in tasks):
        say(AT_EQUAL_LENGTH)
    for note in (*thinking_notes(results), *length_notes(results)):
        say(note)
    for title, labels, taken, counts in confusions(tasks, results):
        table: list[list[Cell | Text]] = [
            [label, *row] for label, row in zip(labels, counts, strict=True)
        ]
        print_table(title, ["correct, given", *taken], table)


def as_json(recipe: Recipe, tasks: Tasks, results: Sequence[ModelResults]) -> dict[str, Any]:
    """Content of eval.json."""
    first, *others = results
    return {
        "recipe": recipe.name,
        "environment": describe_environment(),
        "questions": {
            task.name: [
                {"question": question.text, "reference": question.reference}
                for question in questions
            ]
            for task, questions in tasks
        },
        "models": [model.to_json() for model in results],
        "compared_with": first.description,
        "differences": {
            model.description: {
                "tasks": {
                    name: _as_numbers(differences(first.tasks[name], task))
                    for name, task in model.tasks.items()
                },
                "sides": _as_numbers(_side_differences(first, model)),
                "faults": _as_numbers(_only(memorised=faults_difference([(first, model)]))),
            }
            for model in others
        },
    }


def confusions(
    tasks: Tasks, results: Sequence[ModelResults]
) -> Iterator[tuple[str, list[str], list[str], list[list[int]]]]:
    """Title, correct labels, given labels and counts, by classification task and model."""
    for task, questions in tasks:
        if not isinstance(task, ClassifyTask):
            continue
        labels = labels_of(task.labels, questions)
        references = [question.reference.strip() for question in questions]
        for model in results:
            counts = confusion(labels, references, model.tasks[task.name].answers)
            title = f"{task.name}, {model.description}"
            yield title, labels, [*labels, "none"], counts


def _side_differences(first: ModelResults, other: ModelResults) -> dict[str, Difference]:
    return _only(**{side: side_difference([(first, other)], side) for side in SIDES})


def _only(**changes: Difference | None) -> dict[str, Difference]:
    return {name: change for name, change in changes.items() if change is not None}


def _as_numbers(changes: dict[str, Difference]) -> dict[str, dict[str, float | None]]:
    return {figure: change.as_json() for figure, change in changes.items()}


def write_page(
    recipe: Recipe,
    tasks: Tasks,
    faults: Sequence[KnownFault],
    results: Sequence[ModelResults],
    path: Path,
) -> None:
    """Write the page; wrong answers of the last model of the run come first."""
    answers = [*_answers(tasks, results), *_fault_answers(faults, results)]
    page = EvalPage(
        title=f"{recipe.name}: evaluation",
        subtitle=f"yrunner, {recipe.eval.generation.kind}, {describe_device()}",
        models=[model.description for model in results],
        judged=min(1, len(results) - 1),
        summary=[_row(line) for line in summary_lines(results)],
        figures=[_row(line) for line in figure_lines(results)],
        confusions=[
            Confusion(f"Labels: {title}", labels, taken, counts)
            for title, labels, taken, counts in confusions(tasks, results)
        ],
        tasks=answers,
        notes=[
            *thinking_notes(results),
            *([*NOTES, *length_notes(results)] if len(results) > 1 else ()),
        ],
    )
    write_eval_page(page, path)


def _row(line: Line) -> FigureRow:
    group, figure, reached = line
    return FigureRow(group, figure, [Reached(*part) if part else None for part in reached])


def _answers(tasks: Tasks, results: Sequence[ModelResults]) -> list[TaskAnswers]:
    """The tasks in which something was answered, whether it was written or chosen."""
    found = []
    for task, questions in tasks:
        reached = [model.tasks[task.name] for model in results]
        if not all(result.answers for result in reached):
            continue
        headline = reached[0].headline
        rows = [
            AnswerRow(
                question.text,
                question.reference,
                [result.answers[number] for result in reached],
                [result.per_question[headline][number] for result in reached],
            )
            for number, question in enumerate(questions)
        ]
        found.append(TaskAnswers(task.name, headline, rows))
    return found


def _fault_answers(
    faults: Sequence[KnownFault], results: Sequence[ModelResults]
) -> list[TaskAnswers]:
    """The faulty rows; repeating one counts as wrong."""
    found = [model.faults for model in results if model.faults is not None]
    if not found:
        return []
    rows = [
        AnswerRow(
            fault.question.text,
            f"{fault.kind or 'fault'}: {fault.question.reference}",
            [model.answers[number] for model in found],
            [1 - model.per_row[number] for model in found],
        )
        for number, fault in enumerate(faults)
    ]
    return [TaskAnswers("faulty rows: repeated or not", "not repeated", rows)]
