"""Where the records go besides metrics.jsonl."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from yrunner.errors import MissingError


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise `MissingError` for a tracker whose package is not installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingError(
                f"train.trackers names {tracker}, which is not installed",
                remedy=f"add it by: pip install 'yrunner[{tracker}]'",
            )


def tracker_callbacks(trackers: Sequence[str], folder: Path) -> list[Any]:
    """TensorBoard's callback, writing to `folder`; the others are Trainer's own `report_to`.

    Trainer would let an environment variable, or the date, decide where TensorBoard writes.
    """
    if "tensorboard" not in trackers:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder)))]
