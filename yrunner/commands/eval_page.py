"""eval.html: what an evaluation found, to be read and searched in a browser."""

from collections.abc import Sequence
from pathlib import Path

from yrunner.commands.environment import describe_device
from yrunner.commands.eval_story import Line, Tasks, confusions, figure_lines, summary_lines
from yrunner.evaluation.faults import KnownFault
from yrunner.evaluation.results import ModelResults
from yrunner.recipe.schema import Recipe
from yrunner.reports.exam import (
    AnswerRow,
    AnswerTask,
    Confusion,
    Exam,
    Reached,
    Row,
    write_exam,
)

NOTES = (
    "A change is against the first model. In brackets stands the interval that holds it with 95 % "
    "confidence, by drawing the questions anew two thousand times; a change is coloured only where "
    "that interval leaves out zero.",
)


def write_eval_page(
    recipe: Recipe,
    tasks: Tasks,
    faults: Sequence[KnownFault],
    results: Sequence[ModelResults],
    path: Path,
) -> None:
    """Write the page; the answers that the last model of the run got wrong come first."""
    answers = [*_answers(tasks, results), *_fault_answers(faults, results)]
    exam = Exam(
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
        notes=NOTES if len(results) > 1 else (),
    )
    write_exam(exam, path)


def _row(line: Line) -> Row:
    group, figure, reached = line
    return Row(group, figure, [Reached(*part) if part else None for part in reached])


def _answers(tasks: Tasks, results: Sequence[ModelResults]) -> list[AnswerTask]:
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
        found.append(AnswerTask(task.name, headline, rows))
    return found


def _fault_answers(
    faults: Sequence[KnownFault], results: Sequence[ModelResults]
) -> list[AnswerTask]:
    """The faulty rows: wrong is what a model repeats."""
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
    return [AnswerTask("faulty rows: repeated or not", "not repeated", rows)]
