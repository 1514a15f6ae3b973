"""Tasks, losses and scores of a model: before, after and apart from training."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from yrunner.assembly.identity import package_versions
from yrunner.assembly.run import Run
from yrunner.console import counted, progress, say, warn
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.examples import Examples, Pairs, RatedExamples
from yrunner.data.dataset.prompts import Prompts
from yrunner.distributed.collectives import max_over_ranks, num_ranks
from yrunner.evaluation.evaluated_model import Deferred, EvaluatedModel
from yrunner.evaluation.figure_lines import BASE, unfinished_in_words
from yrunner.evaluation.kept_results import KeptResults
from yrunner.evaluation.memorised_faults import find_memorised
from yrunner.evaluation.parallel import is_first
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.scorers import Answered, mean_score, quality_of
from yrunner.evaluation.tasks import run_task
from yrunner.models.limits import evaluating
from yrunner.models.local import local_folder
from yrunner.recipe.schema.eval import AnswerTask
from yrunner.scoring.measure import TokenScores, score_tokens
from yrunner.storage.run_dir import hash_files, read_json, write_json
from yrunner.training.arguments import token_weight

EXAMPLES_FOR_LOSSES = 200
TOKENS_OF_AN_EXPORT = 20_000
"""Most tokens on which the loss of an exported model is measured: it may run without a GPU."""
LEAST_ROWS, LEAST_QUESTIONS = 4, 4
LEAST_SECONDS = 2.0
"""For answers before and after a short run together."""
STEP_ROWS = 16
"""Answers written at once, of which a step is timed."""


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
        for task, questions in run.eval_tasks
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
        thinking_apart=recipe.eval.thinking == "apart",
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
    folder = local_folder(run.base_source)
    settings = folder / "generation_config.json" if folder is not None else None
    model: dict[str, Any] = {
        "key": run.base_key,
        "generation_config": list(hash_files([settings]).values())
        if settings is not None and settings.is_file()
        else None,
        "dtype": str(run.dtype) if in_training else run.looks_in,
        "attention": recipe.model.attention,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": package_versions(),
    }
    if in_training and (run.dtype != torch.float32 or recipe.tuning.kind == "qlora"):
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
    """Answers and losses of one model, of all rows and questions or of a sample."""

    answers: dict[str, list[Answered]]
    """By task name."""
    token_losses: list[float] = field(default_factory=list)
    """Loss in nats of every target of the examples."""
    rows: list[int] | None = None
    """Indices of the examples whose losses these are; None: the first ones."""
    asked: dict[str, list[int]] | None = None
    """By task name, the indices of its questions; None: all of them."""

    def score(self, task: str, figure: str) -> float:
        """The mean of a figure, such as `exact`, over the task's questions."""
        return mean_score(self.answers[task], figure)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        answers = {
            name: [answered.as_json() for answered in rows] for name, rows in self.answers.items()
        }
        sample = {"rows": self.rows, "asked": self.asked}
        write_json(path, {"answers": answers, "token_losses": self.token_losses, **sample})

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """Read what `save` wrote."""
        content = read_json(path)
        answers = {
            name: [Answered(row["question"], row["reference"], row["answer"]) for row in rows]
            for name, rows in content["answers"].items()
        }
        sample = content.get("rows"), content.get("asked")
        return cls(answers, content["token_losses"], *sample)


def measure_before(run: Run, model: Any, plan: Plan) -> Measured:
    """Measure losses and answers within `eval.budget`; say what was left out.

    A reward model writes no answers: nothing is measured.
    """
    if run.recipe.train.stage == "reward":
        return Measured({})
    examples, budget = _watched_examples(run), run.recipe.eval.budget
    tokens = float(run.dataset.train.lengths.sum()) * plan.num_updates / plan.updates_per_epoch
    work = tokens * (3 if run.recipe.tuning.kind in ("full", "freeze") else 2)
    rows = _spread_rows(examples, None if budget is None else budget * work / 4)
    if budget is None or not _answerable(run):
        asked = None
        scores = _score_watched(run, model, examples, rows, "before")
    else:
        if model.device.type != "cpu":
            # Warms up, without a bar; a CPU takes a fraction of `LEAST_SECONDS` for it.
            first, pad = [examples[row] for row in rows[:1]], run.tokenizer.pad_token_id
            list(score_tokens(model, first, pad_token_id=pad, batch_size=1))
        began = perf_counter()
        scores = _score_watched(run, model, examples, rows, "before")
        spent = perf_counter() - began
        pace = spent / max(1, sum(len(examples[row].input_ids) for row in rows))
        seconds = max(budget * work * pace - 2 * spent, LEAST_SECONDS)
        asked = _choose_questions(run, model, max_over_ranks(seconds))
    kept = kept_results(run, in_training=True)
    answers = answer_tasks(run, model, "before training", asked, kept)
    if kept is not None:
        say_reused(kept)
    if is_first():
        _say_sample(run, len(examples), rows, asked)
    return Measured(answers, _losses_of(scores), rows, asked)


def measure_after(run: Run, model: Any, before: Measured) -> Measured:
    """Measure the same rows and questions as `before`."""
    if run.recipe.train.stage == "reward":
        return Measured({})
    examples = _watched_examples(run)
    rows = _spread_rows(examples, None) if before.rows is None else before.rows
    answers = answer_tasks(run, model, "after training", before.asked)
    scores = _score_watched(run, model, examples, rows, "after")
    return Measured(answers, _losses_of(scores), rows, before.asked)


@dataclass(frozen=True)
class RowLosses:
    """The loss of a model on some rows of a run."""

    rows: int
    purpose: str
    """`validation` or `training`: which rows they are."""
    targets: int
    mean: float
    """Nats per target; NaN without targets."""

    @property
    def in_words(self) -> str:
        """Which rows, and how many targets."""
        rows, targets = counted(self.rows, f"{self.purpose} row"), counted(self.targets, "target")
        return f"{rows} ({targets})"


def losses_of_rows(run: Run, model: Any, description: str) -> RowLosses:
    """The loss of a model on validation rows, or training rows where there are no others.

    On a sample if they are many. A run on rewards has no right answers, so no targets.
    """
    run.split_off_validation()
    examples = _watched_examples(run)
    rows = _spread_rows(examples, TOKENS_OF_AN_EXPORT)
    scores = score_rows(run, model, [examples[row] for row in rows], description)
    losses = _losses_of(scores)
    purpose = "validation" if run.dataset.validation else "training"
    mean = float(np.mean(losses)) if losses else float("nan")
    return RowLosses(len(rows), purpose, len(losses), mean)


def _answerable(run: Run) -> list[tuple[AnswerTask, list[Question]]]:
    """The tasks that `yrun train` measures; the other kinds are left to `yrun eval`."""
    return [(task, asked) for task, asked in run.tasks if isinstance(task, AnswerTask)]


def _watched_examples(run: Run) -> Examples:
    """The examples whose losses are measured before and after training: better answers only."""
    rows = run.dataset.validation or run.dataset.train
    if isinstance(rows, Prompts):
        # A run on rewards has no right answers, whose losses could be measured.
        return rows.examples.select(np.arange(0))
    if isinstance(rows, RatedExamples):
        return rows.examples.select(np.flatnonzero(rows.examples.column("ratings") > 0))
    return rows.chosen if isinstance(rows, Pairs) else rows.examples


def _score_watched(
    run: Run, model: Any, examples: Examples, rows: Sequence[int], when: str
) -> list[TokenScores]:
    chosen = [examples[row] for row in rows]
    return score_rows(run, model, chosen, f"losses, {when} training")


def _losses_of(scores: Sequence[TokenScores]) -> list[float]:
    return [loss for scored in scores for loss in scored.loss_N.tolist()]


def _spread_rows(examples: Examples, max_tokens: float | None) -> list[int]:
    """The first examples; if they have more than `max_tokens`, some of them, evenly spread."""
    number = min(len(examples), EXAMPLES_FOR_LOSSES)
    if max_tokens is None or not number:
        return list(range(number))
    affordable = int(max_tokens / max(1.0, float(examples.lengths[:number].mean())))
    few = min(number, max(LEAST_ROWS, affordable))
    return [index * number // few for index in range(few)]


def _choose_questions(run: Run, model: Any, seconds: float) -> dict[str, list[int]]:
    """The questions of each task that can be answered twice, all tasks together, in `seconds`.

    Their number is all, or a power of two, so that later runs ask the same ones.
    """
    batch_size = min(run.recipe.eval.batch_size, STEP_ROWS)
    step = max_over_ranks(_time_step(model, batch_size)) / num_ranks()
    asked: dict[str, list[int]] = {}
    for task, questions in _answerable(run):
        batches = seconds / (2 * len(_answerable(run))) / (task.max_new_tokens * step)
        order = list(range(len(questions)))
        random.Random(task.name).shuffle(order)
        affordable = int(batches * batch_size)
        if affordable < len(questions):
            affordable = 1 << affordable.bit_length() >> 1
            affordable = affordable if affordable >= LEAST_QUESTIONS else 0
        asked[task.name] = sorted(order[:affordable])
    return asked


def _time_step(model: Any, batch_size: int) -> float:
    """Seconds to write one token of each answer of a batch: those of a forward pass of as many."""
    ids_B1 = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)
    with evaluating(model), torch.no_grad():
        for _ in range(2):  # the first warms up
            began = perf_counter()
            model(input_ids=ids_B1, use_cache=False).logits.sum().item()
    return perf_counter() - began


def _say_sample(
    run: Run, num_examples: int, rows: Sequence[int], asked: dict[str, list[int]] | None
) -> None:
    parts = []
    most = min(num_examples, EXAMPLES_FOR_LOSSES)
    if len(rows) < most:
        parts.append(f"losses of {len(rows):,} of {counted(num_examples, 'row')}")
    if asked is not None:
        for task, questions in _answerable(run):
            number, all_of_it = len(asked[task.name]), counted(len(questions), "question")
            if number < len(questions):
                parts.append(f'{number or "none"} of {all_of_it} of "{task.name}"')
    if parts:
        left = "yrun eval asks all, or " if run.recipe.eval.tasks else "to measure all, "
        say(
            f"measured before and after, within {run.recipe.eval.budget:.0%} of the training "
            f"(eval.budget): {', '.join(parts)}; {left}set eval.budget: null"
        )


def answer_tasks(
    run: Run,
    model: Any,
    who: str,
    asked: Mapping[str, Sequence[int]] | None = None,
    kept: KeptResults | None = None,
) -> dict[str, list[Answered]]:
    """The answers to every task of kind `answer`, by task name. `who` is for the progress bar.

    `asked`: the indices of the questions, if not all; a task without any is left out. `kept`: where
    those of a base are kept.
    """
    recipe, answers = run.recipe, {}
    for task, questions in _answerable(run):
        if asked is not None:
            questions = [questions[index] for index in asked[task.name]]
        if not questions:
            continue
        evaluated = EvaluatedModel(
            model,
            run.tokenizer,
            system=recipe.data.system,
            batch_size=recipe.eval.batch_size,
            progress=partial(progress, f"{task.name}, {who}"),
            name=task.name,
            kept=kept,
            thinking_apart=recipe.eval.thinking == "apart",
        )
        written = evaluated.answer(questions, task.max_new_tokens)
        unfinished = sum(answer.unfinished for answer in written)
        if unfinished and is_first():
            note = unfinished_in_words(unfinished, len(written), f"the model, {who}")
            warn(f"{task.name}: {note}")
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
