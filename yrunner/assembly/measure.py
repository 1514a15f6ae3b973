"""One model in all tasks of a recipe: what `yrun eval` and `yrun compare` are made of.

What a run measures before and after training, kept in its folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from yrunner.assembly.dataset import recipe_sources
from yrunner.assembly.score_rows import score_rows
from yrunner.console import progress
from yrunner.data.conversation import Conversation, TokenizedExample
from yrunner.data.formats.formats import read_conversations
from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.memorised_faults import KnownFault, find_memorised, read_faults
from yrunner.evaluation.parallel import is_first
from yrunner.evaluation.questions import Question, question_of
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.tasks import examine, quality_of, read_task
from yrunner.evaluation.text_metrics import Answered, share_right
from yrunner.recipe.schema.eval import AnswerTask, Task
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import read_json, write_json


def evaluate(
    recipe: Recipe,
    tasks: Sequence[tuple[Task, list[Question]]],
    model: Any,
    tokenizer: Any,
    description: str,
) -> ModelResults:
    """Examine a loaded model in every task, and in the recipe's list of faults.

    `tasks` is what `read_tasks` gave. `description` names the model in progress bars and reports.
    """
    candidate = Candidate(
        model,
        tokenizer,
        system=recipe.data.system,
        batch_size=recipe.eval.batch_size,
        generation=recipe.eval.generation,
        seed=recipe.seed,
    )
    results = {
        task.name: examine(task, questions, _watched(candidate, task.name, description))
        for task, questions in tasks
    }
    faults = None
    if recipe.eval.faults is not None:
        watched = _watched(candidate, "memorised faults", description)
        faults = find_memorised(known_faults(recipe), watched, recipe.eval.faults.max_new_tokens)
    return ModelResults(description, results, quality_of(candidate.written), faults)


def known_faults(recipe: Recipe) -> list[KnownFault]:
    """The faulty rows that the recipe lists. Raises `DataError` where the list cannot be used."""
    listed = recipe.eval.faults
    return [] if listed is None else read_faults(listed.data, listed.list)


def _watched(candidate: Candidate, task: str, description: str) -> Candidate:
    """The same candidate (what it writes is kept together), with a progress bar for the task."""
    if not is_first():
        return candidate
    return replace(candidate, watch=partial(progress, f"{task}, {description}"))


EXAMPLES_FOR_LOSSES = 200
FIRST_ROWS = 10


@dataclass(frozen=True)
class Measured:
    """How one model did."""

    answers: dict[str, list[Answered]]
    """By the name of the task."""
    token_losses: list[float] = field(default_factory=list)
    """Loss in nats of every target of some examples."""

    def right(self, task: str) -> float:
        """Share of the task's questions that were answered exactly."""
        return share_right(self.answers[task])

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        answers = {
            name: [answered.as_json() for answered in rows] for name, rows in self.answers.items()
        }
        write_json(path, {"answers": answers, "token_losses": self.token_losses})

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """Read what `save` wrote."""
        content = read_json(path)
        answers = {
            name: [Answered(row["question"], row["reference"], row["answer"]) for row in rows]
            for name, rows in content["answers"].items()
        }
        return cls(answers, content["token_losses"])


def read_tasks(recipe: Recipe) -> list[tuple[Task, list[Question]]]:
    """The questions of every task; a faulty file is found before anything is loaded or trained.

    A recipe without tasks gets one of its first rows, so that there are answers to look at.
    """
    if recipe.eval.tasks:
        return [(task, read_task(task)) for task in recipe.eval.tasks]
    source = recipe_sources(recipe)[len(recipe.data.train) if recipe.data.validation else 0]
    file = source.files[0]
    rows = read_conversations(file, source.reading).rows
    talks = (row for row in rows if isinstance(row, Conversation) and not row.is_text)
    questions = [question_of(row) for row in islice(talks, FIRST_ROWS)]
    task = AnswerTask(kind="answer", name=f"first rows of {file.name}", side="domain", data=file)
    return [(task, questions)] if questions else []


def measure(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    tasks: Sequence[tuple[Task, list[Question]]],
    examples: Sequence[TokenizedExample],
    when: str,
) -> Measured:
    """Let the model answer the tasks of kind answer, and measure its loss on the first examples."""
    answers = answer_tasks(model, tokenizer, recipe, tasks, f"{when} training")
    watched = examples[:EXAMPLES_FOR_LOSSES]
    scores = score_rows(model, tokenizer, recipe, watched, f"losses, {when} training")
    return Measured(answers, [loss for scored in scores for loss in scored.loss_N.tolist()])


def answer_tasks(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    tasks: Sequence[tuple[Task, list[Question]]],
    who: str,
) -> dict[str, list[Answered]]:
    """The answers to every task of the kind answer, by its name. `who` is for the progress bar.

    The other kinds wait for `yrun eval`: a training should not take longer for being measured.
    """
    answers = {}
    for task, questions in tasks:
        if not isinstance(task, AnswerTask):
            continue
        candidate = Candidate(
            model,
            tokenizer,
            system=recipe.data.system,
            batch_size=recipe.eval.batch_size,
            watch=partial(progress, f"{task.name}, {who}"),
        )
        written = candidate.answer(questions, task.max_new_tokens)
        answers[task.name] = [
            Answered(question.text, question.reference, answer.text)
            for question, answer in zip(questions, written, strict=True)
        ]
    return answers
