"""Token scores on disk, appended row by row, so that interrupted scoring resumes.

A folder with one file per process. A file is a header line with the key, then records: the scores
of one row, with a checksum. A file may end anywhere: everything before the first incomplete record
is valid, the rest is truncated.
"""

# N = target tokens

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import BinaryIO, overload
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring.measure import TokenScores

FORMAT = 1
HEAD = Struct("<Q32sQHHI")
"""Index of the row, hash of its content, its number in its data file, length of that file's name in
bytes, size of a context or 0, number of targets. Then follow the name, the figures, the contexts in
float16, and the checksum of all."""
CHECKSUM = Struct("<I")
FIGURES = {"loss_N": "f4", "entropy_N": "f4", "weight_N": "f4", "top_N": "i4"}
"""Figures of the targets, one array after the other, little-endian."""
BYTES_PER_TARGET = 4 * len(FIGURES)


def row_hashes(examples: Iterable[TokenizedExample]) -> list[str]:
    """A hash of each example's token ids and labels, 32 hexadecimal digits."""
    arrays = (np.array([example.input_ids, example.labels], "<i4") for example in examples)
    return [blake2b(array.tobytes(), digest_size=16).hexdigest() for array in arrays]


class ScoreFile:
    """The scores of rows by one model, as far as they have been computed."""

    def __init__(
        self, folder: Path, header: bytes, hashes: Sequence[str], file: FileIO, end: int
    ) -> None:
        self.folder = folder
        self.header = header
        self.hashes = hashes
        self.file = file
        self.end = end
        """End of the last complete record."""
        self.done: set[int] = set()
        """Indices of the rows whose scores are on disk."""

    @classmethod
    def open(cls, path: Path, key: str, hashes: Sequence[str], *, rank: int = 0) -> "ScoreFile":
        """Resume the scores in the folder `path`, or begin them.

        `key`: a hash of the model and the options, on which scores depend besides the row.
        `hashes`: `row_hashes` of all rows, in order, at most 32 characters each. `rank`: of this
        process, which has a file to itself; a file with another key is replaced. Raises `OSError`.
        """
        path.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"format": FORMAT, "key": key}).encode() + b"\n"
        own = path / f"rank-{rank}.scores"
        own.touch()
        end = max((record.end for record in _read_records(own, header)), default=0)
        # Unbuffered: appended records survive the process.
        scores = cls(path, header, hashes, own.open("r+b", buffering=0), end)
        scores.file.truncate(end)
        if not end:
            scores._write(header)
        scores.done = set(scores._records())
        return scores

    def append(self, index: int, scores: TokenScores) -> None:
        """Write the scores of one row to disk. Raises `OSError`; safe to retry."""
        self._write(_pack(index, self.hashes[index], scores))
        self.done.add(index)

    def read(self, origin_of: Callable[[int], Origin] | None = None) -> "StoredScores":
        """The scores of all rows, in order, from all processes; none may be missing.

        `origin_of`: the current origin of a row, such as `Examples.origin`; None: the origin when
        it was scored. Scores are read lazily.
        """
        records = self._records()
        missing = len(self.hashes) - len(records)
        assert not missing, f"{missing} rows have no scores"
        return StoredScores([records[index] for index in range(len(records))], origin_of)

    def close(self) -> None:
        """Release the file."""
        self.file.close()

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        # At the end of the last complete record, over the rest of a failed write.
        self.file.seek(self.end)
        rest = memoryview(content)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.end += len(content)

    def _records(self) -> dict[int, "_Record"]:
        """The record of each scored row, by its index, from all processes."""
        files = sorted(self.folder.glob("rank-*.scores"))
        records = [record for file in files for record in _read_records(file, self.header)]
        return _match(records, self.hashes)


class StoredScores(Sequence[TokenScores]):
    """The scores of all rows, in order, read from disk one row at a time."""

    def __init__(
        self, records: Sequence["_Record"], origin_of: Callable[[int], Origin] | None = None
    ) -> None:
        self.records = records
        self.origin_of = origin_of
        self.files = {
            file: np.memmap(file, np.uint8, mode="r") for file in {each.file for each in records}
        }

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> TokenScores: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenScores]: ...
    def __getitem__(self, index: int | slice) -> TokenScores | list[TokenScores]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        record = self.records[index]
        content = self.files[record.file][record.start : record.end].tobytes()
        origin = None if self.origin_of is None else self.origin_of(range(len(self))[index])
        return _unpack(content, origin)


@dataclass(frozen=True, slots=True)
class _Record:
    """Location of the scores of one row: bytes `start` to `end` of a file."""

    file: Path
    start: int
    end: int
    index: int
    content: str


def _read_records(file: Path, header: bytes) -> Iterator[_Record]:
    """The complete records of a file, in order; none if the file has another header."""
    with file.open("rb") as scores:
        if scores.read(len(header)) != header:
            return
        start = len(header)
        while (record := _next_record(scores)) is not None:
            index, padded, *_ = HEAD.unpack_from(record)
            content = padded.rstrip(b"\0").decode("ascii")
            yield _Record(file, start, start + len(record), index, content)
            start += len(record)


def _next_record(scores: BinaryIO) -> bytes | None:
    """The next record of a file; None if it is incomplete."""
    head = scores.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    *_, name_size, context_size, num_targets = HEAD.unpack(head)
    size = name_size + num_targets * (BYTES_PER_TARGET + 2 * context_size) + CHECKSUM.size
    if size > os.fstat(scores.fileno()).st_size:
        return None  # a damaged size; do not allocate that much
    record = head + scores.read(size)
    is_complete = record[-CHECKSUM.size :] == CHECKSUM.pack(crc32(record[: -CHECKSUM.size]))
    return record if is_complete else None


def _match(records: Iterable[_Record], hashes: Sequence[str]) -> dict[int, _Record]:
    """The record of each row: the one at its index, or one of equal content from elsewhere."""
    matched: dict[int, _Record] = {}
    moved = []
    for record in records:
        if record.index < len(hashes) and hashes[record.index] == record.content:
            matched[record.index] = record
        else:
            moved.append(record)
    waiting: dict[str, list[int]] = defaultdict(list)
    for index in reversed(range(len(hashes))):
        if index not in matched:
            waiting[hashes[index]].append(index)
    for record in moved:
        if waiting[record.content]:
            matched[waiting[record.content].pop()] = record
    return matched


def _pack(index: int, content: str, scores: TokenScores) -> bytes:
    name = os.fsencode(scores.origin.file)
    contexts = np.empty((0, 0), "<f2")
    if scores.context_NC is not None:
        contexts = scores.context_NC.numpy(force=True).astype("<f2")
    sizes = (len(name), contexts.shape[1], len(scores.loss_N))
    head = HEAD.pack(index, content.encode("ascii"), scores.origin.row, *sizes)
    figures = (
        getattr(scores, figure).numpy(force=True).astype(f"<{kind}").tobytes()
        for figure, kind in FIGURES.items()
    )
    record = b"".join((head, name, *figures, contexts.tobytes()))
    return record + CHECKSUM.pack(crc32(record))


def _unpack(record: bytes, origin: Origin | None) -> TokenScores:
    _, _, row, name_size, context_size, num_targets = HEAD.unpack_from(record)
    start = HEAD.size + name_size
    if origin is None:
        origin = Origin(Path(os.fsdecode(record[HEAD.size : start])), row)
    figures: dict[str, Tensor] = {}
    for figure, kind in FIGURES.items():
        stored_N = np.frombuffer(record, f"<{kind}", num_targets, start)
        start += stored_N.nbytes
        figures[figure] = torch.from_numpy(stored_N.astype(kind))
    figures["top_N"] = figures["top_N"].long()
    context_NC = None
    if context_size:
        stored = np.frombuffer(record, "<f2", num_targets * context_size, start)
        context_NC = torch.from_numpy(stored.astype("f2")).reshape(num_targets, context_size)
    return TokenScores(**figures, origin=origin, context_NC=context_NC)
