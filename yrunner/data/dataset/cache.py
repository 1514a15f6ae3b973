"""Cache tokenized data files by everything they depend on.

The key of an entry is a hash of the data file's bytes, the tokenizer with its chat template, every
option, and the code. An entry is written under another name and renamed, so that it is complete or
absent, even if two runs prepare the same file.
"""

import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from yrunner.data.dataset.examples import COLUMNS, LINES, TOKENS
from yrunner.errors import RunError
from yrunner.storage.ownership import check_writable
from yrunner.storage.run_dir import hash_files, read_json, write_json

REPORT = "report.json"
SECONDS_UNUSED = 30 * 24 * 3600
"""Entries unused for this long are removed."""
SECONDS_ABANDONED = 24 * 3600
PARTIAL = ".partial-"
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Libraries that decide how a row becomes tokens."""


class Cache:
    """A folder of prepared files."""

    def __init__(self, folder: Path, files: Sequence[str] = (TOKENS, COLUMNS)) -> None:
        """`files`: the names of the files in an entry."""
        self.folder = folder
        self.files = files

    def find(self, key: str) -> Path | None:
        """The folder of a complete entry, or None."""
        entry = self.folder / key
        try:
            whole = read_json(entry / REPORT)["hashes"] == self._hashes(entry)
        except (OSError, ValueError, KeyError):
            return None
        if not whole:
            return None
        (entry / REPORT).touch()
        return entry

    def read_report(self, entry: Path) -> dict[str, Any]:
        """The report of an entry; see `complete`."""
        return dict(read_json(entry / REPORT)["report"])

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder to write an entry into, removed unless it is `complete` at the end.

        Raises `RunError` if the folder cannot be made or the disk is full.
        """
        check_writable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_old()
        partial = self.folder / f"{PARTIAL}{uuid4().hex}"
        partial.mkdir()
        try:
            yield partial
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"the disk is full: prepared data could not be written to {self.folder}",
                remedy="free some space, or set another folder, such as output=/another/folder",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def complete(self, key: str, partial: Path, report: Mapping[str, Any]) -> Path:
        """Add a report to an entry, give it its final name, and return its folder."""
        write_json(partial / REPORT, {"hashes": self._hashes(partial), "report": report})
        final = self.folder / key
        try:
            partial.rename(final)
        except OSError:
            # An entry exists: another run was faster, or it is damaged.
            if self.find(key) is None:
                damaged = partial.with_name(f"{partial.name}-damaged")
                final.rename(damaged)
                partial.rename(final)
                shutil.rmtree(damaged, ignore_errors=True)
        return final

    def _remove_old(self) -> None:
        now = time.time()
        for entry in self.folder.iterdir():
            abandoned = entry.name.startswith(PARTIAL)
            limit = SECONDS_ABANDONED if abandoned else SECONDS_UNUSED
            used = entry if abandoned or not (entry / REPORT).exists() else entry / REPORT
            # Another run may have finished the entry, and so renamed it.
            with suppress(FileNotFoundError):
                if now - used.stat().st_mtime > limit:
                    shutil.rmtree(entry, ignore_errors=True)

    def _hashes(self, entry: Path) -> list[str]:
        """Hashes of the files of an entry: a damaged token id could be beyond the vocabulary."""
        files = [entry / name for name in self.files]
        # Only prompts have lines.
        files += [entry / LINES] * (entry / LINES).exists()
        return [*hash_files(files).values()]


def content_key(file: Path, **depends_on: Any) -> str:
    """The key of the entry for a file, and everything else it `depends_on`."""
    with file.open("rb") as opened:
        content = file_digest(opened, "sha256").hexdigest()
    what = {"content": content, "ending": "".join(file.suffixes), "code": _code_version()}
    text = json.dumps(what | depends_on, sort_keys=True, ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of a tokenizer: vocabulary, merges, rules, special tokens and chat template."""
    backend = tokenizer.backend_tokenizer
    # Every call sets these; they are not part of the tokenizer.
    backend.no_padding()
    backend.no_truncation()
    parts = [backend.to_str(), json.dumps(tokenizer.chat_template, sort_keys=True)]
    parts.append(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))
    if "strftime_now" in parts[1]:
        # Llama 3.1's template writes today's date into every conversation.
        parts.append(date.today().isoformat())
    return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _code_version() -> str:
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    libraries = " ".join(version(name) for name in LIBRARIES)
    return sha256(code + libraries.encode()).hexdigest()
