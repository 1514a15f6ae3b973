"""metrics.jsonl: one record a log, on the disk at once."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yrunner.run_dir import write_text

Record = dict[str, Any]


class MetricsFile(TrainerCallback):
    """Appends every record that Trainer logs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Forget the records after the checkpoint that a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= state.global_step]
        write_text(self.path, "".join(_line(record) for record in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Record | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one record."""
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **(logs or {})}))


def read_metrics(path: Path) -> list[Record]:
    """The records of a run, in order; none where it has not logged yet.

    The last line may have been cut off by a kill; it belongs to no checkpoint and is passed over.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
