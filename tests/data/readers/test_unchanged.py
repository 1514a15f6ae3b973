"""A data file that changes while it is read is named, and nothing is kept of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from yrunner.data.dataset import prepare as pipeline
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.readers.text import check_unchanged, states_of, unchanged
from yrunner.errors import DataError

ROWS = [{"instruction": f"question {number}?", "output": "answer"} for number in range(5)]


def append(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("\n")


def set_back(file: Path) -> None:
    """Other bytes, the same size, and the old time."""
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"question 3", b"question X"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.rename(file)


@pytest.mark.parametrize("change", [append, set_back, replace, Path.unlink])
def test_every_change_is_noticed(change: Callable[[Path], object], tmp_path: Path):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    states = states_of([file])
    check_unchanged(states)
    change(file)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: (changed while it was being read|no longer exists)"
    ):
        check_unchanged(states)


def test_a_failure_is_put_down_to_the_change_but_ctrl_c_is_not(tmp_path: Path):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    undone: list[bool] = []
    with (
        pytest.raises(DataError, match="changed while"),
        unchanged(states_of([file]), undo=lambda: undone.append(True)),
    ):
        append(file)
        raise AssertionError("a row has disappeared")
    assert undone == [True]
    with pytest.raises(KeyboardInterrupt), unchanged(states_of([file])):
        append(file)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="other"), unchanged(states_of([file])):
        raise ValueError("other")


def test_rows_of_one_content_are_never_kept_under_the_hash_of_another(
    tmp_path: Path, capitals_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    cache = Cache(tmp_path / "cache")
    content_key = pipeline.content_key

    def somebody_writes_after_the_hash(path: Path, **options: Any) -> str:
        key = content_key(path, **options)
        append(path)
        return key

    monkeypatch.setattr(pipeline, "content_key", somebody_writes_after_the_hash)
    with pytest.raises(DataError, match="changed while it was being read"):
        prepare([Source((file,))], capitals_tokenizer, Rules(max_length=200), cache)
    assert list(cache.folder.iterdir()) == []
