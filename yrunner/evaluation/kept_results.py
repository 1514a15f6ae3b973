"""Keep what a base answered and predicted by content, so that the next command need not ask again.

A file has its final name only when it is complete; what was measured before an interruption is
found again. Nothing is ever out of date: whatever can change a result is part of its name.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from yrunner.distributed.collectives import gather_over_ranks, this_rank
from yrunner.storage.run_dir import read_json, write_text

Result = TypeVar("Result")
NAME_LENGTH = 32


@dataclass(frozen=True)
class KeptResults:
    """The results of one model in a folder that several models share."""

    folder: Path
    model: Mapping[str, Any]
    """What tells the model from others, and how it computes."""
    reused: list[str] = field(default_factory=list)
    """What was found from an earlier command, in order."""
    measured: set[Path] = field(default_factory=set)
    """What this command measured itself."""

    def recall(
        self, name: str, depends_on: Mapping[str, Any], measure: Callable[[], Result]
    ) -> Result:
        """The kept result, or else a new one, which is kept; it must be what JSON can hold.

        `name` is for the user; `depends_on` is everything besides the model that can change it.
        """
        path = self._path(depends_on, ".json")
        kept = _read(path)
        is_everywhere = _all(kept is not None)
        if kept is not None and is_everywhere:
            if path not in self.measured:
                self.reused.append(name)
            result: Result = kept[0]
            return result
        found = measure()
        self.measured.add(path)
        if this_rank() == 0:
            with _placed(path) as own:
                write_text(own, json.dumps(found, ensure_ascii=False) + "\n")
        return found

    def recall_file(
        self,
        depends_on: Mapping[str, Any],
        measure: Callable[[], Result],
        *,
        save: Callable[[Result, Path], None],
        load: Callable[[Path], Result],
    ) -> Result:
        """The same for a result that is a file of tensors."""
        path = self._path(depends_on, ".safetensors")
        if _all(path.is_file()):
            return load(path)
        found = measure()
        if this_rank() == 0:
            with _placed(path) as own:
                save(found, own)
        return found

    def _path(self, depends_on: Mapping[str, Any], ending: str) -> Path:
        text = json.dumps([self.model, depends_on], sort_keys=True, ensure_ascii=False)
        name = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:NAME_LENGTH]
        return self.folder / f"{name}{ending}"


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A name to write to, which is then `path`: other commands may write the same at this time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield own
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def _read(path: Path) -> list[Any] | None:
    """The content of a file as the only item of a list; None if it is missing or damaged."""
    try:
        return [read_json(path)]
    except (FileNotFoundError, ValueError):
        return None


def _all(has: bool) -> bool:
    """Whether every rank has the result: they must measure together, or not at all."""
    return all(gather_over_ranks(has))
