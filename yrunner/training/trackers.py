"""TensorBoard, wandb, swanlab and mlflow: where records go besides metrics.jsonl."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from yrunner.errors import MissingError
from yrunner.losses.targets import TokenWeight
from yrunner.training.histograms import TargetHistograms


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise `MissingError` for a tracker whose package is not installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingError(
                f"train.trackers names {tracker}, which is not installed",
                remedy=f"run pip install 'yrunner[{tracker}]'",
            )


def tracker_callbacks(
    trackers: Sequence[str], folder: Path, weight: TokenWeight
) -> list[TrainerCallback]:
    """Their callbacks. TensorBoard writes to `folder`, the others where their packages do."""
    others = [tracker for tracker in trackers if tracker != "tensorboard"]
    callbacks = [make() for make in get_reporting_integration_callbacks(others)]
    if "tensorboard" in trackers:
        callbacks.append(TensorBoard(folder, TargetHistograms(weight)))
    return callbacks


class TensorBoard(TensorBoardCallback):
    """Writes records as scalars and the targets since the last record as histograms.

    transformers would let an environment variable, or the date, decide where TensorBoard writes.
    """

    def __init__(self, folder: Path, histograms: TargetHistograms) -> None:
        super().__init__()
        self.folder = folder
        self.histograms = histograms

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the folder; hide what was written after the checkpoint of a resumed run."""
        from torch.utils.tensorboard import SummaryWriter

        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one record, and the histograms beside it."""
        histograms = self.histograms.drain()
        if self.tb_writer is None:
            return  # nothing is trained now, or another process writes
        for name, histogram in histograms.items():
            tag = f"train/{name}_histogram"
            self.tb_writer.add_histogram_raw(tag, **vars(histogram), global_step=state.global_step)
        super().on_log(args, state, control, logs=logs, **kwargs)
