"""Tasks, losses and scores of a model: before, after and apart from training."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yrunner.assembly.identity import package_versions
from yrunner.assembly.run import Run
from yrunner.console import progress, say
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.examples import Examples, Pairs, RatedExamples
from yrunner.evaluation.evaluated_model import Deferred, EvaluatedModel
from yrunner.evaluation.figure_lines import BASE
from yrunner.evaluation.kept_results import KeptResults
from yrunner.evaluation.memorised_faults import find_memorised
from yrunner.evaluation.parallel import is_first
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.scorers import Answered, mean_score, quality_of
from yrunner.evaluation.tasks import run_task
from yrunner.models.load import choose_dtype
from yrunner.models.local import local_folder
from yrunner.recipe.schema.eval import AnswerTask
from yrunner.scoring.measure import TokenScores, score_tokens
from yrunner.storage.run_dir import hash_files, read_json, write_json
from yrunner.training.arguments import token_weight

EXAMPLES_FOR_LOSSES = 200


def evaluate(
    run: Run,
    model: Any,
    tokenizer: Any,
    description: str,
    *,
    kept: KeptResults | None = None,
    base: EvaluatedModel | None = None,
) -> ModelResults:
    """Run every task of the recipe and its list of faults on a model, which may be `Deferred`.

    `description` names the model in progress bars and reports. `kept`: where the results of a base
    are kept; `base`: what another model is compared with.
    """
    recipe = run.recipe
    evaluated = replace(evaluated_model(run, model, tokenizer), kept=kept, base=base)
    results = {
        task.name: run_task(task, questions, _watched(evaluated, task.name, description))
        for task, questions in (run.tasks if recipe.eval.tasks else [])
    }
    faults = None
    if recipe.eval.faults is not None:
        watched = _watched(evaluated, "memorised faults", description)
        faults = find_memorised(run.known_faults, watched, recipe.eval.faults.max_new_tokens)
    if kept is not None:
        say_reused(kept)
    return ModelResults(description, results, quality_of(evaluated.written), faults)


def evaluated_model(run: Run, model: Any, tokenizer: Any) -> EvaluatedModel:
    """The model, asked as the recipe says."""
    recipe = run.recipe
    return EvaluatedModel(
        model,
        tokenizer,
        system=recipe.data.system,
        batch_size=recipe.eval.batch_size,
        generation=recipe.eval.generation,
        seed=recipe.seed,
    )


def base_of(run: Run, tokenizer: Any) -> EvaluatedModel | None:
    """The base that other models are compared with, loaded only for what is not kept.

    None for a model from scratch.
    """
    if run.recipe.model.base is None:
        return None
    base = evaluated_model(run, Deferred(run.load_base), tokenizer)
    return replace(base, kept=kept_results(run))


def kept_results(run: Run, *, in_training: bool = False) -> KeptResults | None:
    """What earlier commands measured with the recipe's base; None for a model from scratch.

    `in_training`: the base is measured as it is trained, which in float32 makes no difference. None
    where it starts from an adapter: what it answers is not the base's.
    """
    recipe = run.recipe
    starts_from_adapter = getattr(recipe.tuning, "adapter", None) is not None
    if recipe.model.base is None or (in_training and starts_from_adapter):
        return None
    dtype = choose_dtype(recipe.model.dtype)
    folder = local_folder(run.base_source)
    settings = folder / "generation_config.json" if folder is not None else None
    model: dict[str, Any] = {
        "key": run.base_key,
        "generation_config": list(hash_files([settings]).values())
        if settings is not None and settings.is_file()
        else None,
        "dtype": str(dtype),
        "attention": recipe.model.attention,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": package_versions(),
    }
    if in_training and (dtype != torch.float32 or recipe.tuning.kind == "qlora"):
        model["training"] = recipe.tuning.model_dump(mode="json")
    return KeptResults(run.folder.base_results, model)


def say_reused(kept: KeptResults) -> None:
    """Say what was not measured again."""
    if kept.reused and is_first():
        names = ", ".join(dict.fromkeys(kept.reused))
        say(f"base results of an earlier run: {names} ({kept.folder})")


def _watched(model: EvaluatedModel, task: str, description: str) -> EvaluatedModel:
    """The model with a progress bar for the task; what it writes is still collected."""
    base = None if model.base is None else _watched(model.base, task, BASE)
    named = replace(model, name=task, base=base)
    if not is_first():
        return named
    return replace(named, progress=partial(progress, f"{task}, {description}"))


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


def watched_examples(run: Run) -> Examples:
    """The examples whose losses are measured before and after training: better answers only."""
    rows = run.dataset.validation or run.dataset.train
    if isinstance(rows, RatedExamples):
        return rows.examples.select(np.flatnonzero(rows.examples.column("ratings") > 0))
    return rows.chosen if isinstance(rows, Pairs) else rows.examples


def measure(run: Run, model: Any, examples: Sequence[TokenizedExample], when: str) -> Measured:
    """Answer the tasks of kind `answer`, and measure the loss on the first examples.

    A reward model writes no answers: nothing is measured.
    """
    if run.recipe.train.stage == "reward":
        return Measured({})
    kept = kept_results(run, in_training=True) if when == "before" else None
    answers = answer_tasks(run, model, f"{when} training", kept)
    if kept is not None:
        say_reused(kept)
    watched = examples[:EXAMPLES_FOR_LOSSES]
    scores = score_rows(run, model, watched, f"losses, {when} training")
    return Measured(answers, [loss for scored in scores for loss in scored.loss_N.tolist()])


def answer_tasks(
    run: Run, model: Any, who: str, kept: KeptResults | None = None
) -> dict[str, list[Answered]]:
    """The answers to every task of kind `answer`, by task name. `who` is for the progress bar.

    The other kinds are left to `yrun eval`, to keep training short. `kept`: where those of a base
    are kept.
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
            name=task.name,
            kept=kept,
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
        weight=token_weight(run.recipe.token_loss)[0],
    )
    found = []
    with progress(description, len(examples)) as advance:
        for scored in scores:
            found.append(scored)
            advance(1)
    return found
