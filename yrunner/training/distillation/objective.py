"""Learning from labels and from a teacher: (1 - weight) x loss + weight x T^2 x divergence."""

from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor

from yrunner.data.batching.answers import model_inputs
from yrunner.data.batching.batches import Batch
from yrunner.data.batching.taught import IS_LABEL
from yrunner.distributed.collectives import sum_over_ranks
from yrunner.losses.distillation import Lesson, TeacherDivergence
from yrunner.losses.fused_head import measure_targets
from yrunner.losses.targets import PLAIN, Targets, sum_targets
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.distillation.teacher import Teacher, Writer
from yrunner.training.metrics import SignalMeter
from yrunner.training.objective import TargetObjective
from yrunner.training.replay_loss import KeptMean
from yrunner.training.rng_snapshot import Stateful


class TaughtObjective(TargetObjective):
    """The weighted loss of labels, and the divergence from a teacher at every target.

    What the student writes has no label: there the divergence alone counts. Both means are over all
    of an update, whose targets are counted when the student has written.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Teacher,
        divergence: TeacherDivergence,
        teacher_share: float,
        weigh_teacher: bool = False,
        writer: Writer | None = None,
        **options: Any,
    ) -> None:
        """`teacher_share`: the `weight` of its part; `writer`: lets the student write answers."""
        super().__init__(*args, **options)
        self.teacher, self.divergence, self.writer = teacher, divergence, writer
        self.teacher_share, self.weigh_teacher = teacher_share, weigh_teacher
        self.mean = KeptMean()
        """Of the divergence per target."""
        self._num_taught = torch.ones(())
        """Targets of the update that the teacher predicts, over all ranks."""

    @property
    def sums(self) -> dict[str, Stateful]:
        """Also that of the divergence."""
        return {**super().sums, "teacher": self.mean}

    def begin_update(
        self, model: Any, batches: MutableSequence[Batch], device: torch.device
    ) -> None:
        """Let the student write its answers, in place of rows, and count labels and targets."""
        self.meter.start()
        if self.writer is not None:
            self.writer.replace_rows(model, batches)
        counts = torch.tensor([[count_labels(batch), count_taught(batch)] for batch in batches])
        counts_2 = sum_over_ranks(counts.sum(dim=0).double().to(device)).clamp(min=1)
        self._num_targets, self._num_taught = counts_2.float()
        self._weights_of_update = []

    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        lesson = self._lesson(batch, self._num_targets, self._num_taught)
        targets = measure_targets(called, model_inputs(batch), self.weight, lesson=lesson)
        self._add_figures(only_labels(targets, batch), targets)
        assert targets.divergence_N is not None
        self.mean.add(targets.divergence_N.double().sum(), len(targets.divergence_N))
        return targets.weighted.float()

    def _lesson(self, batch: Batch, labels: float | Tensor, taught: float | Tensor) -> Lesson:
        prediction, head = self.teacher.predict(batch)
        squared = self.divergence.temperature**2
        return Lesson(
            prediction,
            head,
            self.divergence,
            label_factor=(1 - self.teacher_share) / labels,
            teacher_factor=self.teacher_share * squared / taught,
            weighs=self.weigh_teacher,
            is_label_N=batch.get(IS_LABEL),
        )

    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The summed loss of both, and the plain mean of the labels."""
        lesson = self._lesson(batch, 1.0, 1.0)
        targets = measure_targets(model, model_inputs(batch), self.weight, lesson=lesson)
        return targets.weighted, float(targets.loss_N.double().mean())

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The plain loss per target, and the divergence from the teacher."""
        model.eval()
        meter, mean = SignalMeter(), KeptMean()
        for batch in batches:
            with torch.no_grad():
                lesson = self._lesson(batch, 1.0, 1.0)
                targets = measure_targets(model, model_inputs(batch), PLAIN, lesson=lesson)
            meter.add(sum_targets(targets, self.loss_deadline))
            assert targets.divergence_N is not None
            mean.add(targets.divergence_N.double().sum(), len(targets.divergence_N))
        figures = meter.drain()
        return {
            "eval_loss": figures["loss"],
            "eval_targets": figures["targets"],
            "eval_teacher_divergence": mean.take(sum_over_ranks),
        }

    def drain(self) -> dict[str, float]:
        """Also the divergence from the teacher, in nats per target."""
        return super().drain() | {"teacher_divergence": self.mean.take(sum_over_ranks)}


def count_taught(batch: Batch) -> int:
    """Targets of a micro-batch."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


def count_labels(batch: Batch) -> int:
    """Targets that are not what the student wrote."""
    return int(batch[IS_LABEL].sum()) if IS_LABEL in batch else count_taught(batch)


def only_labels(targets: Targets, batch: Batch) -> Targets:
    """The figures of the targets that are from the data."""
    if IS_LABEL not in batch:
        return targets
    figures: Sequence[tuple[str, Any]] = list(vars(targets).items())
    chosen = {
        name: value[batch[IS_LABEL]] if name.endswith("_N") and value is not None else value
        for name, value in figures
    }
    return Targets(**chosen)
