"""Cross-fitting: score every row with a model that was trained on the other rows.

Copies of a row share a fold, so that none scores another.
"""

import gc
import hashlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerState

from yrunner.assembly.identity import fingerprint
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import (
    TrainingTask,
    compared,
    has_base_beneath,
    make_trainer,
    mixed_precision,
    reference_in_words,
    score_reference,
    untrained_model,
)
from yrunner.console import counted, format_duration, say
from yrunner.data.batching.plan import Plan
from yrunner.data.dataset.examples import Examples, StoredRows
from yrunner.errors import YRunnerError
from yrunner.models.errors import silence_libraries
from yrunner.recipe.schema.keep import DriftSection, NoKeep
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.schema.sort import SortSection
from yrunner.scoring.measure import TokenScores, score_by_length
from yrunner.scoring.score_file import ScoreFile, row_hashes
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.loop import Trainer
from yrunner.training.preference.reference import Reference

PASSES, PASSES_OF_PAIRS = 10, 3
"""Epochs of each model, unless sort.cross_fit_steps is set; after more, pairs are remembered."""
COST_OF_LEARNING = 3
"""Per token, relative to scoring: a backward pass takes twice as long as a forward pass."""


def cross_fit(run: Run, folder: Path) -> list[TokenScores]:
    """The scores of each training example, in order, by a model not trained on its fold.

    For each of the `sort.cross_fit` folds the base is loaded again and tuned on the other rows as
    the recipe says, for `sort.cross_fit_steps` updates or ten epochs. Scores are written to
    `folder` as they come. A complete fold is reused; an interrupted one is trained again and scores
    the missing rows. Raises `YRunnerError` if there are fewer different rows than folds.
    """
    folds = _cut_into_folds(run, folder)
    pending = [fold for fold in folds if not fold.is_finished]
    if len(pending) < len(folds):
        say(f"cross-fit: {len(folds) - len(pending)} of {len(folds)} folds are scored already")
    clock = _Clock(sum(fold.work for fold in pending))
    with ExitStack() as files:
        for fold in folds:
            files.enter_context(fold.file)
        for fold in pending:
            _score_fold(fold, folder, clock)
        return _in_order(folds, len(run.dataset.train.examples))


def group_copies(rows: Sequence[Hashable], hashes: Sequence[str]) -> list[str]:
    """The group of each example: one for all parts of a row and of its copies.

    `rows`: the row of each example; `hashes`: the hash of its content.
    """
    parts: defaultdict[Hashable, list[str]] = defaultdict(list)
    for row, content in zip(rows, hashes, strict=True):
        parts[row].append(content)
    return ["".join(parts[row]) for row in rows]


def make_folds(groups: Sequence[Hashable], num_folds: int, seed: int) -> list[int]:
    """The fold of each row, from 0 to `num_folds` - 1; deterministic for groups and seed.

    Rows of one group (see `group_copies`) share a fold: a copy of a faulty row would teach the
    fault to the model that has to find it. Otherwise folds are of equal size. Raises `YRunnerError`
    if there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < num_folds:
        raise YRunnerError(
            f"{num_folds} folds need {num_folds} different rows; there are {len(sizes)}",
            remedy="set sort.cross_fit to 0, or add rows",
        )
    drawn = list(sizes)
    random.Random(f"{seed} folds").shuffle(drawn)
    rows_of_fold = [0] * num_folds
    fold_of_group: dict[Hashable, int] = {}
    # Largest groups first, so that single rows even the folds out.
    for group in sorted(drawn, key=sizes.__getitem__, reverse=True):
        smallest = rows_of_fold.index(min(rows_of_fold))
        fold_of_group[group] = smallest
        rows_of_fold[smallest] += sizes[group]
    return [fold_of_group[group] for group in groups]


@dataclass(frozen=True)
class _Fold:
    """Held-out rows, and the training on all others."""

    name: str
    """Such as: fold 1 of 3."""
    run: Run
    """The same for every fold."""
    learned: StoredRows[Any]
    held_out: Examples
    """Both answers of each pair."""
    places: NDArray[np.intp]
    """Indices of the held-out examples."""
    plan: Plan
    file: ScoreFile

    @property
    def is_finished(self) -> bool:
        return len(self.file.done) == len(self.held_out)

    @property
    def work_of_update(self) -> float:
        """Cost of an update, in scored tokens."""
        tokens_of_pass = float(self.learned.lengths.sum())
        return COST_OF_LEARNING * tokens_of_pass / self.plan.updates_per_epoch

    @property
    def work(self) -> float:
        """Cost of the fold, in scored tokens."""
        return self.work_of_update * self.plan.num_updates + float(self.held_out.lengths.sum())


def _cut_into_folds(run: Run, folder: Path) -> list[_Fold]:
    recipe, rows = run.recipe, run.dataset.train
    examples, each = rows.examples, rows.EXAMPLES_EACH
    number = recipe.sort.cross_fit
    hashes = row_hashes(examples)
    rows_E = zip(examples.file_E.tolist(), examples.column("rows").tolist(), strict=True)
    groups = group_copies(list(rows_E), hashes)[::each]
    fold_R = np.array(make_folds(groups, number, recipe.seed))
    fold_E = fold_R.repeat(each)
    training = run.variant(_training_of_a_fold(recipe))
    key = _key(training, hashes, [*fold_E.tolist(), *examples.column("ratings").tolist()])
    folds = []
    for index in range(number):
        places = np.flatnonzero(fold_E == index)
        learned = rows.select(np.flatnonzero(fold_R != index))
        folds.append(
            _Fold(
                name=f"fold {index + 1} of {number}",
                run=training,
                learned=learned,
                held_out=examples.select(places),
                places=places,
                plan=training.plan_for(learned, num_ranks=1),
                file=ScoreFile.open(
                    folder / f"fold-{index + 1}", key, [hashes[place] for place in places]
                ),
            )
        )
    return folds


def _training_of_a_fold(recipe: Recipe) -> Recipe:
    """The recipe's training with another length, without parts that only its result needs."""
    steps = recipe.sort.cross_fit_steps
    passes = PASSES_OF_PAIRS if recipe.learns_from_pairs else PASSES
    train = recipe.train.model_copy(
        update={
            "epochs": passes if steps is None else None,
            "max_steps": steps,
            "order": "shuffle",
            "early_stopping": None,
            "trackers": [],
            "torch_compile": False,
        }
    )
    others = {"sort": SortSection(), "keep": NoKeep(), "drift": DriftSection()}
    return recipe.model_copy(update={"train": train, **others})


def _key(training: Run, hashes: list[str], numbers: list[int]) -> str:
    """A hash of everything that the scores depend on; `numbers`: fold and rating of each row."""
    facts = [
        fingerprint(training.recipe),
        training.base_key,
        training.precision.name,
        hashes,
        numbers,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _score_fold(fold: _Fold, folder: Path, clock: "_Clock") -> None:
    say(
        f"cross-fit, {fold.name}: {counted(fold.plan.num_updates, 'update')} on "
        f"{counted(len(fold.learned), 'row')}, then scoring "
        f"{counted(len(fold.held_out) // fold.learned.EXAMPLES_EACH, 'other')}"
    )
    # A model with a fused head refers to itself; free it before loading the next.
    gc.collect()
    trainer = _tuned(fold, folder, clock)
    scores = score_by_length(
        trainer.model,
        fold.held_out,
        pad_token_id=fold.run.tokenizer.pad_token_id,
        max_tokens=fold.run.max_tokens,
        weight=token_weight(fold.run.recipe.token_loss)[0],
        done=fold.file.done,
    )
    with mixed_precision(trainer, fold.run.dtype):
        for index, scored in scores:
            fold.file.append(index, scored)
    clock.add(float(fold.held_out.lengths.sum()))
    say(f"cross-fit, {fold.name}: scored, {clock.left()}")


def _tuned(fold: _Fold, folder: Path, clock: "_Clock") -> Trainer:
    """The fold's trainer after training."""
    recipe = fold.run.recipe
    quarters = {-(-fold.plan.num_updates * quarter // 4) for quarter in range(1, 5)}
    # Before the model, as in train.py: under DeepSpeed ZeRO-3 they decide how weights load.
    arguments = make_arguments(
        recipe.train,
        folder=folder,
        name=f"{recipe.name}, {fold.name}",
        num_updates=fold.plan.num_updates,
        seed=recipe.seed,
        dtype=fold.run.dtype,
    )
    model = untrained_model(fold.run)
    task = TrainingTask(
        plan=fold.plan,
        train=fold.learned,
        folder=RunDir(folder),
        cadence=Cadence(fold.plan.num_updates, log_at=quarters),
        callbacks=[_Lines(fold, clock)],
        reference=_reference(fold, model),
    )
    trainer = make_trainer(fold.run, model, arguments, task)
    with silence_libraries():
        trainer.train()
    return trainer


def _reference(fold: _Fold, model: Any) -> Reference | None:
    """What the model, not yet tuned, makes of the answers to learn from, if it needs to know."""
    recipe = fold.run.recipe
    if reference_in_words(recipe) is None or has_base_beneath(recipe):
        return None
    parts = (compared(fold.run, rows) for rows in (fold.learned, fold.learned[:0]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return score_reference(fold.run, model.to(device), *parts)


def _in_order(folds: list[_Fold], num_rows: int) -> list[TokenScores]:
    by_place: dict[int, TokenScores] = {}
    for fold in folds:
        by_place |= zip(fold.places.tolist(), fold.file.read(fold.held_out.origin), strict=True)
    return [by_place[place] for place in range(num_rows)]


class _Clock:
    """Estimated time left for all folds."""

    def __init__(self, work: float) -> None:
        self.work = work
        self.done = 0.0
        self.started = time.monotonic()

    def add(self, work: float) -> None:
        self.done += work

    def left(self) -> str:
        seconds = (time.monotonic() - self.started) * (self.work / self.done - 1)
        return f"{format_duration(max(0.0, seconds))} left for all folds"


class _Lines(TrainerCallback):
    """Prints a line for every record of a fold's training; nothing is saved."""

    def __init__(self, fold: _Fold, clock: _Clock) -> None:
        self.fold = fold
        self.clock = clock

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the work that is done."""
        self.clock.add(self.fold.work_of_update)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Say how far the fold is, what it has learnt, and how long all of them still take."""
        say(
            f"cross-fit, {self.fold.name}: update {state.global_step}/{state.max_steps}  "
            f"loss {logs['loss']:.4f}  {self.clock.left()}"
        )
