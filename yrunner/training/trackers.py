"""Where the records go besides metrics.jsonl."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from yrunner.errors import MissingError
from yrunner.losses.targets import TokenWeight
from yrunner.training.histograms import TargetHistograms


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise `MissingError` for a tracker whose package is not installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingError(
                f"train.trackers names {tracker}, which is not installed",
                remedy=f"add it by: pip install 'yrunner[{tracker}]'",
            )


def tracker_callbacks(
    trackers: Sequence[str], folder: Path, weight: TokenWeight
) -> list["TensorBoard"]:
    """TensorBoard's callback, writing to `folder`; the others are Trainer's own `report_to`."""
    return [TensorBoard(folder, TargetHistograms(weight))] if "tensorboard" in trackers else []


class TensorBoard(TensorBoardCallback, ExportableState):
    """Writes records as scalars and the targets since the last record as histograms.

    Trainer would let an environment variable, or the date, decide where TensorBoard writes.
    """

    def __init__(self, folder: Path, histograms: TargetHistograms) -> None:
        super().__init__()
        self.folder = folder
        self.histograms = histograms

    def state(self) -> dict[str, Any]:
        """What a checkpoint between two logs keeps."""
        return {"args": {}, "attributes": {"pending": self.histograms.pending}}

    @property
    def pending(self) -> list[Any] | None:
        """What was counted for the next histograms."""
        return self.histograms.pending

    @pending.setter
    def pending(self, pending: list[Any] | None) -> None:
        self.histograms.pending = pending

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the folder; hide what was written after the checkpoint of a resumed run."""
        from torch.utils.tensorboard import SummaryWriter

        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one record, and the histograms beside it."""
        histograms = self.histograms.drain()
        if self.tb_writer is None:
            return  # nothing is trained now, or another process writes
        for name, histogram in histograms.items():
            tag = f"train/{name}_histogram"
            self.tb_writer.add_histogram_raw(tag, **vars(histogram), global_step=state.global_step)
        super().on_log(args, state, control, logs=logs, **kwargs)
