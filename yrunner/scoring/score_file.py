"""Scores of tokens on disk, appended as they come: what was measured once is not measured again.

A folder with a file for each process that writes. A file is one line that names the key, then
records; a record is the scores of one row, with a checksum. So a file may end anywhere: what stands
before the first record that is not whole can be trusted, the rest is cut off.
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
"""Index of the row, hash of its content, its number in its data file, bytes of that file's name,
size of a context or 0, number of targets. Then come the name, the figures, the contexts in float16,
and the checksum of all that."""
CHECKSUM = Struct("<I")
FIGURES = {"loss_N": "f4", "entropy_N": "f4", "weight_N": "f4", "top_N": "i4"}
"""What is kept of each target, one figure of all targets after the other, little-endian."""
BYTES_PER_TARGET = 4 * len(FIGURES)


def row_hashes(examples: Iterable[TokenizedExample]) -> list[str]:
    """A hash of each example's token ids and labels, 32 hexadecimal digits."""
    arrays = (np.array([example.input_ids, example.labels], "<i4") for example in examples)
    return [blake2b(array.tobytes(), digest_size=16).hexdigest() for array in arrays]


class ScoreFile:
    """The scores of some rows by one model, as far as they have been measured."""

    def __init__(
        self, folder: Path, header: bytes, hashes: Sequence[str], file: FileIO, end: int
    ) -> None:
        self.folder = folder
        self.header = header
        self.hashes = hashes
        self.file = file
        self.end = end
        """Behind the last whole record."""
        self.done: set[int] = set()
        """Indices of the rows whose scores are on disk."""

    @classmethod
    def open(cls, path: Path, key: str, hashes: Sequence[str], *, rank: int = 0) -> "ScoreFile":
        """Go on with the scores in the folder `path`, or begin them.

        `key` says what the scores depend on besides the row: the model and the options. `hashes`:
        `row_hashes` of all rows, in order, of 32 characters at most. `rank`: the number of this
        process, which writes to a file of its own; one of another key is replaced. Raises
        `OSError`.
        """
        path.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"format": FORMAT, "key": key}).encode() + b"\n"
        own = path / f"rank-{rank}.scores"
        own.touch()
        end = max((record.end for record in _read_records(own, header)), default=0)
        # Nothing waits in a buffer: what was appended outlives this process.
        scores = cls(path, header, hashes, own.open("r+b", buffering=0), end)
        scores.file.truncate(end)
        if not end:
            scores._write(header)
        scores.done = set(scores._records())
        return scores

    def append(self, index: int, scores: TokenScores) -> None:
        """Write the scores of one row to disk. Raises `OSError`, after which it can be repeated."""
        self._write(_pack(index, self.hashes[index], scores))
        self.done.add(index)

    def read(self, origin_of: Callable[[int], Origin] | None = None) -> "StoredScores":
        """The scores of all rows, in order, those of the other processes too; none may be missing.

        `origin_of`: where a row stands now, as `Examples.origin` says; None: where it stood when it
        was measured. Only whether a row is at hand is found out now; it is read when asked for.
        """
        records = self._records()
        missing = len(self.hashes) - len(records)
        assert not missing, f"{missing} rows have not been measured"
        return StoredScores([records[index] for index in range(len(records))], origin_of)

    def close(self) -> None:
        """Release the file."""
        self.file.close()

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        # From the end of what is whole, over the rest of a write that failed.
        self.file.seek(self.end)
        rest = memoryview(content)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.end += len(content)

    def _records(self) -> dict[int, "_Record"]:
        """Where the scores of each row stand that was measured by any process, by its index."""
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
    def __getitem__(self, place: int) -> TokenScores: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenScores]: ...
    def __getitem__(self, place: int | slice) -> TokenScores | list[TokenScores]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        record = self.records[place]
        content = self.files[record.file][record.start : record.end].tobytes()
        origin = None if self.origin_of is None else self.origin_of(range(len(self))[place])
        return _unpack(content, origin)


@dataclass(frozen=True, slots=True)
class _Record:
    """Where the scores of one row stand, from byte `start` to before byte `end`."""

    file: Path
    start: int
    end: int
    index: int
    content: str


def _read_records(file: Path, header: bytes) -> Iterator[_Record]:
    """The whole records of a file, in order; none where the file has another header."""
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
    """The next record of a file; None where it is not whole."""
    head = scores.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    *_, name_size, context_size, num_targets = HEAD.unpack(head)
    size = name_size + num_targets * (BYTES_PER_TARGET + 2 * context_size) + CHECKSUM.size
    if size > os.fstat(scores.fileno()).st_size:
        return None  # as large as only a damaged number can be; memory would be taken for it
    record = head + scores.read(size)
    is_whole = record[-CHECKSUM.size :] == CHECKSUM.pack(crc32(record[: -CHECKSUM.size]))
    return record if is_whole else None


def _match(records: Iterable[_Record], hashes: Sequence[str]) -> dict[int, _Record]:
    """The record of each row: that of its place, or one of equal content that stood elsewhere."""
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
