"""Replay rows on disk: which there are, which drafts are still needed, and how long they take."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yrunner.console import counted, format_duration, say, warn
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import RunError
from yrunner.evaluation.self_replay import (
    FAULTS,
    SERIES,
    Draft,
    ReplayFault,
    ReplayRow,
    SeenTexts,
    Series,
    find_fault,
)
from yrunner.storage.run_dir import ReplayDir, read_json, write_json, write_text

MOST_TRIES = 12
"""Drafts per requested row, at most: some bases write few different rows."""
LEAST_VALID = 0.1
"""Share of drafts that must be valid: a base below it has never learned to write."""
FIRST_CHECK = 128
"""Drafts before that share is checked."""
EXPECTED_VALID = 0.8
"""Share of drafts that are expected to be usable, before there is a count."""
LEAST_ROWS = 8
"""Replay rows that `write_minutes` must suffice for: fewer would say the same thing too often."""
TOKENS_OF_A_ROW = 100
"""Length of a row with question and answer for the first estimate."""
SECONDS_TO_ESTIMATE = 3.0
"""Writing time before the first estimate."""
UNFINISHED = "unfinished"
"""The key of a row with a turn that was cut off."""


@dataclass(frozen=True)
class Wanted:
    """How many rows a run needs from its base."""

    rows: int = 0
    drift_rows: int = 0
    finished: bool = False
    """Whether replay rows must have an end: as text, the others would teach to stop anywhere."""

    def by_series(self) -> dict[Series, int]:
        """Under the names of the files and of the keys in replay.json."""
        return {"held_out": self.drift_rows, "rows": self.rows}

    @property
    def key_of_minutes(self) -> str:
        """The key that sets the time, if the recipe has it: without `keep` there are drift rows."""
        return " (keep.write_minutes)" if self.rows else ""


@dataclass
class ReplayStore:
    """The files of a replay folder and their record."""

    folder: ReplayDir
    origin: dict[str, Any] = field(default_factory=dict)
    """The base and how it writes, for the record."""
    num_drafts: Counter[Series] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    requested: dict[str, int] = field(default_factory=dict)
    """The most rows ever requested per series: one with fewer has all that the base can write."""
    minutes: dict[str, float] = field(default_factory=dict)
    """The `write_minutes` of each series that has fewer because the time was over."""
    seen: SeenTexts = field(default_factory=SeenTexts)
    kept: Counter[tuple[Series, bool]] = field(default_factory=Counter)
    """Rows of each series, finished or not."""

    @classmethod
    def open(cls, folder: ReplayDir, apart_from: Sequence[str] = ()) -> "ReplayStore":
        """Read what is on disk. New rows will not be like the lines of `apart_from` either."""
        store = cls(folder)
        for line in apart_from:
            store.seen.add(_text_of(line))
        if not folder.record.exists():
            for path in (folder.rows, folder.held_out, folder.dropped):
                path.unlink(missing_ok=True)
            return store
        record = read_json(folder.record)
        store.num_drafts, store.fates = Counter(record["drafts"]), Counter(record["fates"])
        store.requested, store.minutes = record["asked"], record["minutes"]
        for path in (folder.rows, folder.held_out, folder.dropped):
            store._remove_unrecorded(path)
        for series in SERIES:
            for line in lines_of(store.file_of(series)):
                store.seen.add(_text_of(line))
                store.kept[series, is_finished(line)] += 1
        return store

    def file_of(self, series: Series) -> Path:
        """The file of a series."""
        return self.folder.held_out if series == "held_out" else self.folder.rows

    def _remove_unrecorded(self, path: Path) -> None:
        """Remove lines that the record does not count yet: their drafts are written again."""
        lines = lines_of(path)
        whole = [line for line in lines if self._is_recorded(json.loads(line), path)]
        if len(whole) < len(lines):
            write_text(path, "".join(f"{line}\n" for line in whole))

    def _is_recorded(self, row: dict[str, Any], path: Path) -> bool:
        series = row.get("series", path.stem)
        return bool(row.get("draft", -1) < self.num_drafts[series])

    @property
    def name(self) -> str:
        """The name of the base."""
        return self.folder.folder.name.rpartition("-")[0]

    @property
    def num_kept(self) -> int:
        """Drafts that are usable, finished or not."""
        return self.fates["finished"] + self.fates["unfinished"]

    def count(self, series: Series, wanted: Wanted) -> int:
        """How many rows of a series a run could use."""
        unfinished = 0 if series == "rows" and wanted.finished else self.kept[series, False]
        return self.kept[series, True] + unfinished

    def lacks(self, wanted: Wanted, minutes: float) -> bool:
        """Whether more rows, or more time, are wanted than before: deleted rows stay deleted."""
        return any(
            number > self.requested.get(_requested_as(series, wanted), 0)
            or minutes > self.minutes.get(_requested_as(series, wanted), math.inf)
            for series, number in wanted.by_series().items()
            if number > self.count(series, wanted)
        )

    def take(self, row: ReplayRow) -> None:
        """Check a draft, append it to its file, and update the record."""
        series, fault = row.draft.series, find_fault(row, self.seen)
        path = self.folder.dropped if fault else self.file_of(series)
        if fault is None:
            self.seen.add(row.text)
            self.kept[series, row.finished] += 1
        self.fates[fault or ("finished" if row.finished else "unfinished")] += 1
        self.num_drafts[series] += 1
        write_text(path, "".join(f"{line}\n" for line in [*lines_of(path), _line(row, fault)]))
        self.save()

    def save(self) -> None:
        """Write the record, which says which lines are complete."""
        content = {"drafts": dict(self.num_drafts), "fates": dict(self.fates)}
        content |= {"asked": self.requested, "minutes": self.minutes}
        write_json(self.folder.record, self.origin | content)


def _requested_as(series: Series, wanted: Wanted) -> str:
    return "finished rows" if series == "rows" and wanted.finished else series


@dataclass
class DraftQueue:
    """Which drafts are to be written, and which of those written can be taken.

    Drafts are taken by their numbers, and the rows of drift before all others: which rows there are
    must not depend on what ends first.
    """

    store: ReplayStore
    wanted: Wanted
    started: Counter[Series] = field(init=False)
    last: dict[Series, int] = field(init=False)
    waiting: dict[Draft, ReplayRow] = field(default_factory=dict)
    num_ended: int = 0
    """Drafts that were written, taken or waiting."""

    def __post_init__(self) -> None:
        self.started = Counter(self.store.num_drafts)
        self.last = {
            series: self.started[series] + MOST_TRIES * number
            for series, number in self.wanted.by_series().items()
        }

    def next_draft(self) -> Draft | None:
        """A draft that is probably needed: if those being written are as often usable as before."""
        for series, number in self.wanted.by_series().items():
            running = self.started[series] - self.store.num_drafts[series]
            missing = number - self.store.count(series, self.wanted)
            if self.is_over(series) or running * self._share_valid(series) >= missing:
                continue
            self.started[series] += 1
            return Draft(series, self.started[series] - 1)
        return None

    def take(self, row: ReplayRow) -> None:
        """Store a row, and those that waited for it."""
        self.num_ended += 1
        self.waiting[row.draft] = row
        for series in self.wanted.by_series():
            while not self.is_over(series):
                following = Draft(series, self.store.num_drafts[series])
                if following not in self.waiting:
                    return
                self.store.take(self.waiting.pop(following))

    @property
    def num_running(self) -> int:
        """Drafts that are being written."""
        return self.started.total() - self.store.num_drafts.total() - len(self.waiting)

    @property
    def all_over(self) -> bool:
        """Whether no draft is needed any more."""
        return all(self.is_over(series) for series in self.wanted.by_series())

    @property
    def missing(self) -> int:
        """Rows that are wanted and not there."""
        return sum(
            max(0, number - self.store.count(series, self.wanted))
            for series, number in self.wanted.by_series().items()
        )

    def is_over(self, series: Series) -> bool:
        """Whether a series has enough rows, or too many drafts."""
        found, drafts = self.store.count(series, self.wanted), self.store.num_drafts[series]
        hopeless = drafts >= FIRST_CHECK and found < LEAST_VALID * drafts
        enough = found >= self.wanted.by_series()[series]
        return enough or hopeless or drafts >= self.last[series]

    def close(self, minutes: float) -> None:
        """Record what was wanted, and which series have less because the time was over."""
        for series, number in self.wanted.by_series().items():
            name = _requested_as(series, self.wanted)
            if number and self.is_over(series):
                self.store.minutes.pop(name, None)
            elif number:
                self.store.minutes[name] = minutes
            self.store.requested[name] = max(number, self.store.requested.get(name, 0))
        self.store.save()

    def _share_valid(self, series: Series) -> float:
        drafts = self.store.num_drafts[series]
        return (self.store.count(series, self.wanted) + EXPECTED_VALID) / (drafts + 1)


class Pace:
    """How fast the base writes, and when its time is over."""

    def __init__(self, queue: DraftQueue, minutes: float) -> None:
        self._queue, self._at_first, self._minutes = queue, queue.missing, minutes
        self._start = time.monotonic()
        self._tokens, self._estimated = 0, False

    @property
    def _seconds(self) -> float:
        return max(1e-3, time.monotonic() - self._start)

    def is_over(self) -> bool:
        """Whether `write_minutes` are over."""
        return self._seconds > 60 * self._minutes

    def next_draft(self) -> Draft | None:
        """A draft of the queue, if there is time to finish another one."""
        seconds, ended = self._seconds, self._queue.num_ended
        # Little's law: how long a draft takes is their number over how many end in a second.
        each = self._queue.num_running * seconds / ended if ended else 0.0
        return None if seconds + each > 60 * self._minutes else self._queue.next_draft()

    def count(self, num_tokens: int) -> None:
        """Count tokens, and say once how long it may take."""
        self._tokens += num_tokens
        if self._estimated or self._seconds < SECONDS_TO_ESTIMATE:
            return
        self._estimated = True
        speed, most = self._tokens / self._seconds, 60 * self._minutes
        key = self._queue.wanted.key_of_minutes
        seconds = self._at_first * TOKENS_OF_A_ROW / speed
        say(
            f"{num_rows(self._at_first)} of about {TOKENS_OF_A_ROW} tokens at {speed:,.0f} "
            f"tokens/s take about {format_duration(seconds)}"
            + (f"; writing ends at {format_duration(most)}{key}" * (seconds > most))
        )

    def describe(self) -> str:
        """Tokens per second, and the time left."""
        done = self._at_first - self._queue.missing
        speed = f"{self._tokens / self._seconds:,.0f} tokens/s"
        if not done or not self._queue.missing:
            return speed
        left = self._seconds * self._queue.missing / done
        left = min(left, max(0.0, 60 * self._minutes - self._seconds))
        return f"{speed}, {format_duration(left)} left"


def check_counts(queue: DraftQueue, minutes: float) -> None:
    """Say what became of the drafts; raises `RunError` for too few rows."""
    store, wanted = queue.store, queue.wanted
    dropped = ", ".join(f"{store.fates[fault]:,} {fault}" for fault in FAULTS if store.fates[fault])
    unfinished = store.fates["unfinished"]
    say(
        f"{counted(store.num_drafts.total(), 'draft')}: {store.num_kept:,} kept"
        + (f", {unfinished:,} of them unfinished (no end mark)" if unfinished else "")
        + (f"; dropped: {dropped}" if dropped else "")
        + f"; in {store.folder.folder}"
    )
    unit = "minute" if minutes == 1 else "minutes"
    out_of_time = f"in {minutes:g} {unit}{wanted.key_of_minutes}"
    for series, number in wanted.by_series().items():
        found = store.count(series, wanted)
        in_time = queue.is_over(series)
        least = LEAST_VALID * number if in_time else min(LEAST_ROWS, number)
        if series == "rows" and found < least:
            raise _too_few(found, wanted, out_of_time if not in_time else "", dropped, unfinished)
        kind = "drift rows" if series == "held_out" else "replay rows"
        if found < number and in_time:
            warn(f"the base repeats itself: {found:,} {kind} instead of {number:,}")
        elif found < number:
            warn(f"{found:,} {kind} instead of {number:,} {out_of_time}")


def _too_few(
    found: int, wanted: Wanted, out_of_time: str, dropped: str, unfinished: int
) -> RunError:
    valid = "finished" if wanted.finished else "valid"
    if out_of_time:
        why, remedy = f" {out_of_time}", "raise keep.write_minutes"
    else:
        left_out = [f"{unfinished:,} unfinished"] if wanted.finished and unfinished else []
        why = f" ({', '.join([*left_out, *([dropped] if dropped else [])])})"
        remedy = "raise keep.max_new_tokens"
    return RunError(
        f"the base wrote {found:,} {valid} {'row' if found == 1 else 'rows'} instead of "
        f"{wanted.rows:,}{why}",
        remedy=f"{remedy}, or use rows of a file with keep.kind: rows",
    )


def _line(written: ReplayRow, fault: ReplayFault | None) -> str:
    messages = written.messages
    if messages[0].role == "text":
        row: dict[str, Any] = {"text": messages[0].content}
    else:
        row = {"messages": [{"role": one.role, "content": one.content} for one in messages]}
    row["draft"] = written.draft.number
    if fault is not None:
        row = {"why": fault, "series": written.draft.series} | row
    elif not written.finished:
        row[UNFINISHED] = True
    return json.dumps(row, ensure_ascii=False)


def is_finished(line: str) -> bool:
    """Whether all turns of a row have an end."""
    return not json.loads(line).get(UNFINISHED, False)


def _text_of(line: str) -> str:
    """The text of a row; a user may have edited it into another form."""
    row = json.loads(line)
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return "\n".join(value for value in row.values() if isinstance(value, str))


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none if there is no file."""
    if not path.exists():
        return []
    # Not splitlines: JSON strings may contain line ends of Unicode.
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]
