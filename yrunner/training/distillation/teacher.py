"""The teacher of a run: a model beside the student, or what it predicted for all rows before."""

from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Any, Protocol

from yrunner.data.batching.answers import model_inputs
from yrunner.data.batching.batches import Batch
from yrunner.data.batching.taught import PLACES, TaughtBatches
from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.kl import BaseHead, BasePrediction, HiddenBase, predict_base
from yrunner.models.limits import evaluating
from yrunner.scoring.stored_predictions import StoredPredictions


class Teacher(Protocol):
    """Predicts the targets of micro-batches."""

    def predict(self, batch: Batch) -> tuple[BasePrediction, BaseHead | None]:
        """Its prediction, and its head where the prediction is hidden states."""


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher that is not in memory."""

    predictions: StoredPredictions

    def predict(self, batch: Batch) -> tuple[BasePrediction, BaseHead | None]:
        """See `Teacher`; the batch is one of the rows that were predicted."""
        return self.predictions.of(batch[PLACES].tolist(), batch["labels"].device), None


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher in memory, on the student's device, prepared by `attach`."""

    model: Any

    def predict(self, batch: Batch) -> tuple[BasePrediction, BaseHead | None]:
        """See `Teacher`."""
        with evaluating(self.model):
            prediction = predict_base(self.model, model_inputs(batch))
        if isinstance(prediction, HiddenBase):
            return prediction, self.model.fused_head.base_head()
        return prediction, None


class Writer(Protocol):
    """Lets the student write answers."""

    def replace_rows(self, model: Any, batches: MutableSequence[Batch]) -> None:
        """Replace the micro-batches of an update in which the student writes."""


@dataclass(frozen=True)
class Teaching:
    """A teacher, and how a student learns from it."""

    teacher: Teacher
    divergence: TeacherDivergence
    writer: Callable[[TaughtBatches], Writer] | None = None
    """None: all answers are those of the rows."""
