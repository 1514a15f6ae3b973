"""Rows of a sort that a person keeps, edits or drops, written as a new file with a log."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yrunner.data.readers.files import kind_of, read_rows
from yrunner.errors import RunError
from yrunner.scoring.order import NO_CLUSTER, beyond_shares, suspicion
from yrunner.storage.found_runs import RunFiles
from yrunner.storage.run_dir import DATA_ENDINGS, write_text
from yrunner.storage.run_files import LARGEST, is_inside, read_inside

MOST_SHOWN = 100
MOST_POINTS = 5000
LONGEST_TEXT = 200
"""Characters of a typical row."""
CHOICES = ("keep", "edit", "drop")
TOO_LARGE = "set marks on the page of the sort, save them, and sort again with sort.marks"


@dataclass(frozen=True)
class ScoredRow:
    """A row of a sorted corpus."""

    file: str
    number: int
    place: int | None
    """In the sorted corpus, from 1; None for a dropped row."""
    why_dropped: str | None
    scores: Mapping[str, float]
    row: Any
    """As its file holds it."""
    cluster: int = NO_CLUSTER
    point: tuple[float, float] | None = None
    """Its place in the picture of the clusters."""

    @property
    def key(self) -> str:
        """By which the page names the row."""
        return f"{self.file}:{self.number}"


class SortedRows:
    """The rows of a finished sort, read from its folder alone."""

    def __init__(self, files: RunFiles, root: Path) -> None:
        """Raises `RunError` if there is no such sort, or one too large for a page."""
        self._files, self._root = files, root
        self.rows = {row.key: row for row in self._read()}
        self._described = self._clusters()

    def shown(self, score: str | None, start: int) -> dict[str, Any]:
        """Some rows, the most suspicious first."""
        rows = list(self.rows.values())
        names = list(rows[0].scores) if rows else []
        by = score if score in names else next(iter(names), None)
        ordered = sorted(
            rows, key=lambda row: (-suspicion(by or "", row.scores.get(by or "", 0.0)), row.key)
        )
        return {
            "number": len(rows),
            "scores": names,
            "by": by,
            "start": start,
            "rows": [
                {
                    "key": row.key,
                    "why_dropped": row.why_dropped,
                    "score": row.scores.get(by or ""),
                    "row": row.row,
                }
                for row in ordered[start : start + MOST_SHOWN]
            ],
        }

    def clusters(self) -> dict[str, Any]:
        """The clusters, the largest first, with the text of their typical rows, and some rows as
        points with the numbers of their clusters."""
        step = -(-len(self.rows) // MOST_POINTS) or 1
        points = [row for row in self.rows.values() if row.point is not None][::step]
        found = []
        for cluster in self._described.get("clusters", []):
            keys = [f"{place['file']}:{place['row']}" for place in cluster["typical"]]
            rows = [self.rows[key] for key in keys if key in self.rows]
            texts = [{"key": row.key, "text": _text_of(row.row)} for row in rows]
            found.append({**cluster, "typical": texts})
        return {
            "clusters": found,
            "points": [[*row.point, row.cluster] for row in points if row.point is not None],
        }

    def mend(
        self, changes: Mapping[str, Any], shares: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Write the corpus with these changes to a new file, and beside it what was changed.

        `changes`: by `ScoredRow.key`, `{"do": "keep" | "edit" | "drop", "row": {...}}`. `shares`:
        by the number of a cluster, the share of its rows to keep, the least suspicious; a change
        of a row comes first. Raises `RunError` for a change that fits no row or cluster.
        """
        if not changes and not shares:
            raise RunError("nothing was changed")
        for key, change in changes.items():
            self._check(key, change)
        kept, log = self._decide(changes, self._beyond(shares))
        if not kept:
            raise RunError("no row would be left", remedy="keep more of the clusters")
        path, log_path = self._free_names()
        write_text(path, "".join(map(_line, kept)))
        write_text(log_path, "".join(map(_line, log)))
        return {"file": str(path), "log": str(log_path), "rows": len(kept), "changed": len(log)}

    def _check(self, key: str, change: Any) -> None:
        if key not in self.rows:
            raise RunError(f"there is no row {key[:80]}")
        if not isinstance(change, dict) or change.get("do") not in CHOICES:
            raise RunError(f"{key}: choose keep, edit or drop")
        if change["do"] == "edit" and not isinstance(change.get("row"), dict):
            raise RunError(f"{key}: an edited row must be a JSON object")

    def _beyond(self, shares: Mapping[str, Any]) -> dict[str, str]:
        """Why rows are too many for their clusters, by their keys."""
        numbers = {str(cluster["cluster"]) for cluster in self._described.get("clusters", [])}
        for number, share in shares.items():
            if number not in numbers:
                raise RunError(f"there is no cluster {number[:80]}")
            if type(share) not in (int, float) or not 0 <= share <= 1:
                raise RunError(f"cluster {number}: the share to keep must be from 0 to 1")
        rows = list(self.rows.values())
        deciding = self._described.get("deciding", "")
        reasons = beyond_shares(
            [suspicion(deciding, row.scores.get(deciding, 0.0)) for row in rows],
            [row.cluster for row in rows],
            {int(number): share for number, share in shares.items()},
        )
        return {rows[index].key: reason for index, reason in reasons.items()}

    def _decide(
        self, changes: Mapping[str, Any], beyond: Mapping[str, str]
    ) -> tuple[list[Any], list[dict[str, Any]]]:
        """The rows of the new file in their order, and the log."""
        last = len(self.rows) + 1
        kept, log = [], []
        for row in sorted(self.rows.values(), key=lambda row: row.place or last):
            by_share = {"do": "drop"} if row.place and row.key in beyond else {}
            change = changes.get(row.key, by_share)
            does = change.get("do", "keep" if row.place else "drop")
            after = {"keep": row.row, "drop": None, "edit": change.get("row")}[does]
            if after is not None:
                kept.append(after)
            was_kept = row.place is not None
            if change and (does == "edit" or was_kept != (after is not None)):
                log.append(
                    {
                        "file": row.file,
                        "row": row.number,
                        "do": does,
                        "why": beyond[row.key] if change is by_share else "by hand",
                        "why_dropped": row.why_dropped,
                        "before": row.row,
                        "after": after,
                    }
                )
        return kept, log

    def _free_names(self) -> tuple[Path, Path]:
        """Names beside the run folder that no file has."""
        folder, name = place_beside(self._files.folder, self._root)
        number = 1
        while True:
            path = folder / f"{name}-mended-{number}.jsonl"
            log = folder / f"{name}-mended-{number}.log.jsonl"
            if not os.path.lexists(path) and not os.path.lexists(log):
                return path, log
            number += 1

    def _read(self) -> Iterator[ScoredRow]:
        sort = self._files.sort
        try:
            lines = read_inside(sort.scores, self._root).splitlines()
        except FileNotFoundError:
            raise RunError(
                f"{self._files.folder.name} has no sort that fits on a page", remedy=TOO_LARGE
            ) from None
        records = [json.loads(line) for line in lines]
        by_place = {record["place"]: record for record in records if record["place"] is not None}
        reasons = self._reasons()
        by_key = {(record["file"], record["row"]): record for record in records}
        for place, row in enumerate(self._data("sorted"), start=1):
            if place in by_place:
                yield _scored(by_place[place], row)
        for reason, row in zip(reasons, self._data("dropped"), strict=False):
            record = by_key.get((reason["file"], reason["row"]))
            if record is not None:
                yield _scored(record, row)

    def _clusters(self) -> dict[str, Any]:
        try:
            found = json.loads(read_inside(self._files.sort.clusters, self._root))
        except FileNotFoundError:
            return {}  # without scikit-learn, or by an older version
        return found if isinstance(found, dict) else {}

    def _reasons(self) -> list[dict[str, Any]]:
        try:
            lines = read_inside(self._files.sort.reasons, self._root).splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def _data(self, name: str) -> Iterator[Any]:
        """The rows of the sorted or the dropped file, whatever its ending."""
        endings = [f"{ending}{packed}" for ending in DATA_ENDINGS for packed in ("", ".gz")]
        for ending in endings:
            path = self._files.sort.folder / f"{name}{ending}"
            if not is_inside(path, self._root) or not path.is_file() or kind_of(path) is None:
                continue
            if path.stat().st_size > LARGEST:
                raise RunError(f"{path.name} is too large for a page", remedy=TOO_LARGE)
            yield from (row for _, row in read_rows(path))
            return


def save_row(files: RunFiles, root: Path, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Append a conversation to the file that `yrun chat` saves to as well."""
    folder, name = place_beside(files.folder, root)
    path = folder / f"{name}-saved.jsonl"
    with open(path, "ab", opener=_without_links) as file:
        file.write(_line({"messages": list(messages)}).encode())
    return {"file": str(path), "rows": sum(1 for _ in read_inside(path, root).splitlines())}


def place_beside(folder: Path, root: Path) -> tuple[Path, str]:
    """Where to write about a run, and the start of the name: beside its folder, inside the root."""
    return (root if folder == root else folder.parent), folder.resolve().name


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _scored(record: Mapping[str, Any], row: Any) -> ScoredRow:
    crossed = record.get("cross_fit") or {}
    scores = {f"cross-fit {name}": value for name, value in crossed.items()}
    point = record.get("plane")
    return ScoredRow(
        record["file"],
        record["row"],
        record["place"],
        record["dropped"],
        {**(record["scores"] or {}), **scores},
        row,
        record.get("cluster", NO_CLUSTER),
        None if point is None else (point[0], point[1]),
    )


def _text_of(row: Any) -> str:
    """The start of what a row says: its texts, in the order of its file."""
    match row:
        case str():
            text = row
        case dict():
            text = " → ".join(filter(None, map(_text_of, row.values())))
        case list():
            text = " → ".join(filter(None, map(_text_of, row)))
        case _:
            text = ""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def _line(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise RunError(f"a row cannot be written as JSON: {error}") from error
