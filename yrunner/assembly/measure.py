"""Tasks, losses and scores of a model: before, after and apart from training."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from yrunner.assembly.run import Run
from yrunner.console import progress
from yrunner.data.conversation import TokenizedExample
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.memorised_faults import find_memorised
from yrunner.evaluation.parallel import is_first
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.scorers import Answered, mean_score, quality_of
from yrunner.evaluation.tasks import run_task
from yrunner.recipe.schema.eval import AnswerTask
from yrunner.scoring.measure import TokenScores, score_tokens
from yrunner.storage.run_dir import read_json, write_json
from yrunner.training.arguments import token_weight

EXAMPLES_FOR_LOSSES = 200


def evaluate(run: Run, model: Any, tokenizer: Any, description: str) -> ModelResults:
    """Run every task of the recipe and its list of faults on a loaded model.

    `description` names the model in progress bars and reports.
    """
    recipe = run.recipe
    evaluated = EvaluatedModel(
        model,
        tokenizer,
        system=recipe.data.system,
        batch_size=recipe.eval.batch_size,
        generation=recipe.eval.generation,
        seed=recipe.seed,
    )
    results = {
        task.name: run_task(task, questions, _watched(evaluated, task.name, description))
        for task, questions in (run.tasks if recipe.eval.tasks else [])
    }
    faults = None
    if recipe.eval.faults is not None:
        watched = _watched(evaluated, "memorised faults", description)
        faults = find_memorised(run.known_faults, watched, recipe.eval.faults.max_new_tokens)
    return ModelResults(description, results, quality_of(evaluated.written), faults)


def _watched(model: EvaluatedModel, task: str, description: str) -> EvaluatedModel:
    """The model with a progress bar for the task; what it writes is still collected."""
    if not is_first():
        return model
    return replace(model, progress=partial(progress, f"{task}, {description}"))


@dataclass(frozen=True)
class Measured:
    """Answers and losses of one model."""

    answers: dict[str, list[Answered]]
    """By task name."""
    token_losses: list[float] = field(default_factory=list)
    """Loss in nats of every target of the first examples."""

    def score(self, task: str, figure: str) -> float:
        """The mean of a figure, such as `exact`, over the task's questions."""
        return mean_score(self.answers[task], figure)

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


def measure(run: Run, model: Any, examples: Sequence[TokenizedExample], when: str) -> Measured:
    """Answer the tasks of kind `answer`, and measure the loss on the first examples."""
    answers = answer_tasks(run, model, f"{when} training")
    watched = examples[:EXAMPLES_FOR_LOSSES]
    scores = score_rows(run, model, watched, f"losses, {when} training")
    return Measured(answers, [loss for scored in scores for loss in scored.loss_N.tolist()])


def answer_tasks(run: Run, model: Any, who: str) -> dict[str, list[Answered]]:
    """The answers to every task of kind `answer`, by task name. `who` is for the progress bar.

    The other kinds are left to `yrun eval`, to keep training short.
    """
    recipe, answers = run.recipe, {}
    for task, questions in run.tasks:
        if not isinstance(task, AnswerTask):
            continue
        evaluated = EvaluatedModel(
            model,
            run.tokenizer,
            system=recipe.data.system,
            batch_size=recipe.eval.batch_size,
            progress=partial(progress, f"{task.name}, {who}"),
        )
        written = evaluated.answer(questions, task.max_new_tokens)
        answers[task.name] = [
            Answered(question.text, question.reference, answer.text)
            for question, answer in zip(questions, written, strict=True)
        ]
    return answers


def score_rows(
    run: Run, model: Any, examples: Sequence[TokenizedExample], description: str
) -> list[TokenScores]:
    """The scores of each example, in order, with the weights of the recipe's loss."""
    scores = score_tokens(
        model,
        examples,
        pad_token_id=run.tokenizer.pad_token_id,
        batch_size=run.recipe.train.batch_size,
        weight=token_weight(run.recipe.loss)[0],
    )
    found = []
    with progress(description, len(examples)) as advance:
        for scored in scores:
            found.append(scored)
            advance(1)
    return found
