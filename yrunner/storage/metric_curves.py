"""Curves of a metrics.jsonl that may still grow, downsampled while it is read."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from yrunner.storage.run_files import open_inside

MOST_POINTS = 1_200
"""Points of a curve; with more, neighbours are averaged."""
LONGEST_RECORD = 64 * 2**10
"""Bytes at the end of a file that hold at least one whole record."""
LAST = 12
"""Records at the end that tell the speed."""
AT_ONCE = 4 * 2**10
LOSS = re.compile(rb'"loss": (-?[\d.]+(?:e[-+]?\d+)?)')


@dataclass
class MetricCurve:
    """One figure over the updates, as means of equally many neighbouring records."""

    steps: list[int] = field(default_factory=list)
    """Of the last record in each point."""
    values: list[float] = field(default_factory=list)
    records_per_point: int = 1
    _sum: float = 0.0
    _number: int = 0

    def add(self, step: int, value: float) -> None:
        """Add the figure of one record; what is not finite has no place on a curve."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._number += 1
        if self._number < self.records_per_point:
            return
        self.steps.append(step)
        self.values.append(self._sum / self._number)
        self._sum, self._number = 0.0, 0
        if len(self.values) >= MOST_POINTS:
            self._halve()

    def _halve(self) -> None:
        self.steps = self.steps[1::2]
        pairs = zip(self.values[::2], self.values[1::2], strict=True)
        self.values = [(one + other) / 2 for one, other in pairs]
        self.records_per_point *= 2


class GrowingMetrics:
    """The curves of one file; `read_more` takes in what was appended since the last call."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path, self._root = path, root
        self._file: tuple[int, int] | None = None
        self._end = 0
        self.curves: dict[str, MetricCurve] = {}
        self.num_records = 0

    def read_more(self) -> tuple[bool, list[dict[str, float]]]:
        """Whether the file was replaced and read anew, and the new records, `step` among them.

        A resumed run replaces its file: records behind its checkpoint are gone.
        """
        try:
            file = open_inside(self._path, self._root)
        except FileNotFoundError:
            return self._start_over(None), []
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            is_new = identity != self._file or status.st_size < self._end
            if is_new:
                self._start_over(identity)
            return is_new, self._read(file)

    def as_json(self) -> dict[str, Any]:
        """Steps and values by figure."""
        return {
            name: {"steps": curve.steps, "values": [float(f"{v:.5g}") for v in curve.values]}
            for name, curve in self.curves.items()
        }

    def _start_over(self, identity: tuple[int, int] | None) -> bool:
        had_records = self.num_records > 0
        self._file, self._end = identity, 0
        self.curves, self.num_records = {}, 0
        return had_records

    def _read(self, file: BinaryIO) -> list[dict[str, float]]:
        """Take in the whole lines behind the last ones read."""
        file.seek(self._end)
        news: list[dict[str, float]] = []
        for line in file:
            if not line.endswith(b"\n"):
                break  # still being written
            self._end += len(line)
            record = figures_of(line)
            step = record.pop("step", None)
            if step is None:
                continue
            self.num_records += 1
            for name, value in record.items():
                curve = self.curves.get(name)
                if curve is None:
                    curve = self.curves[name] = MetricCurve()
                curve.add(int(step), value)
            news.append({"step": step, **record})
            del news[:-MOST_POINTS]  # a file that is read for the first time may be long
        return news


def figures_of(line: bytes) -> dict[str, float]:
    """The numbers of one record; empty for a damaged line."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    return {key: value for key, value in record.items() if type(value) in (int, float)}


def last_records(file: BinaryIO) -> list[dict[str, float]]:
    """The last records of a file, in order, and before them the last with a validation loss.

    Only the end of the file is read.
    """
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - LONGEST_RECORD)
    content = os.pread(file.fileno(), size - start, start)
    lines = content.split(b"\n")[start > 0 : -1]  # the last is empty, or still being written
    validations = [line for line in lines[:-LAST] if b'"eval_loss"' in line][-1:]
    records = map(figures_of, [*validations, *lines[-LAST:]])
    return [record for record in records if "step" in record]


def sampled_losses(file: BinaryIO, number: int) -> list[float]:
    """About `number` losses, evenly spread over the file, without reading the rest."""
    size = os.fstat(file.fileno()).st_size
    values, seen = [], -1
    for place in range(number):
        start = size * place // number
        content = os.pread(file.fileno(), AT_ONCE, start)
        first = 0 if start == 0 else content.find(b"\n") + 1
        end = content.find(b"\n", first)
        if end < 0 or start + first <= seen:
            continue
        seen = start + first
        found = LOSS.search(content, first, end)
        if found is not None:
            values.append(float(f"{float(found[1]):.4g}"))
    return values
