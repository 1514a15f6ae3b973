"""Mended rows are a new file and a log; nothing that was there is changed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.board.conftest import make_run, make_sort
from yrunner.commands.board.rows import SortedRows, save_row
from yrunner.errors import RunError
from yrunner.storage.found_runs import RunFiles

EDITED = {"instruction": "Q2?", "output": "mended"}


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    run = make_run(tmp_path, "one")
    make_sort(run)
    return RunFiles(run.folder)


def read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def mend(files: RunFiles, changes: Any) -> dict[str, Any]:
    return SortedRows(files, files.folder.parent).mend(changes)


def test_changes_go_to_a_new_file_and_the_log_says_what_they_were(files: RunFiles):
    root = files.folder.parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    changes = {
        "a.jsonl:2": {"do": "edit", "row": EDITED},
        "a.jsonl:3": {"do": "drop"},
        "a.jsonl:6": {"do": "keep"},
        "a.jsonl:4": {"do": "keep"},  # as it was: not in the log
    }
    made = mend(files, changes)
    assert [row["instruction"] for row in read(made["file"])] == ["Q2?", "Q4?", "Q5?", "Q1?", "Q6?"]
    assert read(made["file"])[0] == EDITED
    log = {line["row"]: line for line in read(made["log"])}
    assert {row: line["do"] for row, line in log.items()} == {2: "edit", 3: "drop", 6: "keep"}
    assert log[2]["before"] == {"instruction": "Q2?", "output": "A2"}
    assert log[2]["after"] == EDITED and log[3]["after"] is None
    assert log[6]["why_dropped"] == "bad"
    assert all(path.read_bytes() == content for path, content in before.items())
    again = mend(files, changes)
    assert again["file"] != made["file"]
    assert read(again["file"]) == read(made["file"])


def test_of_a_cluster_a_share_is_kept_and_the_log_says_why(files: RunFiles):
    sorted_rows = SortedRows(files, files.folder.parent)
    changes = {"a.jsonl:4": {"do": "keep"}}  # a choice of its own comes before the share
    made = sorted_rows.mend(changes, {"1": 0.5, "0": 1})
    assert [row["instruction"] for row in read(made["file"])] == ["Q2?", "Q4?", "Q5?", "Q1?"]
    (line,) = read(made["log"])
    assert (line["row"], line["do"], line["after"]) == (3, "drop", None)
    assert line["why"] == "is not among the 50 % least suspicious of cluster 1"


@pytest.mark.parametrize("shares", [{"7": 0.5}, {"1": 1.5}, {"1": "half"}, {"1": True}])
def test_a_share_that_fits_no_cluster_writes_nothing(files: RunFiles, shares: Any):
    with pytest.raises(RunError):
        SortedRows(files, files.folder.parent).mend({}, shares)
    with pytest.raises(RunError, match="no row would be left"):
        SortedRows(files, files.folder.parent).mend({}, {"1": 0, "0": 0})
    assert not list(files.folder.parent.glob("*mended*"))


def test_clusters_are_shown_with_typical_rows_and_points(files: RunFiles):
    found = SortedRows(files, files.folder.parent).clusters()
    assert found["clusters"][0]["typical"] == [
        {"key": "a.jsonl:3", "text": "Q3? → A3"},
        {"key": "a.jsonl:1", "text": "Q1? → A1"},
    ]
    assert sorted(found["points"])[0] == [1, 2, 1] and len(found["points"]) == 6
    files.sort.clusters.unlink()  # a sort without scikit-learn
    assert SortedRows(files, files.folder.parent).clusters()["clusters"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"a.jsonl:99": {"do": "drop"}},
        {"../a.jsonl:1": {"do": "drop"}},
        {"a.jsonl:1": {"do": "burn"}},
        {"a.jsonl:1": "drop"},
        {"a.jsonl:1": {"do": "edit"}},
        {"a.jsonl:1": {"do": "edit", "row": [1]}},
    ],
)
def test_a_change_that_fits_no_row_writes_nothing(files: RunFiles, changes: Any):
    with pytest.raises(RunError):
        mend(files, changes)
    assert not list(files.folder.parent.glob("*mended*"))


def test_rows_are_shown_most_suspicious_first(files: RunFiles):
    rows = SortedRows(files, files.folder.parent)
    assert rows.shown(None, 0)["by"] == "excess"
    assert [row["key"][-1] for row in rows.shown("excess", 0)["rows"]] == list("654321")
    assert [row["key"][-1] for row in rows.shown("similarity", 4)["rows"]] == ["5", "6"]
    assert rows.shown("no such score", 0)["by"] == "excess"


def test_the_server_does_without_torch():
    program = "import sys, yrunner.commands.board.server; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_run_without_a_sort_says_so(tmp_path: Path):
    run = make_run(tmp_path, "one")
    with pytest.raises(RunError, match="has no sort"):
        SortedRows(RunFiles(run.folder), tmp_path)


def test_saved_rows_are_appended_to_the_file_of_the_chat(files: RunFiles):
    root = files.folder.parent
    for number, text in enumerate(("一", "two"), start=1):
        saved = save_row(files, root, [{"role": "user", "content": text}])
        assert saved["rows"] == number
    assert [row["messages"][0]["content"] for row in read(saved["file"])] == ["一", "two"]
    assert saved["file"] == str(root / "one-saved.jsonl")


def test_a_link_in_place_of_the_saved_rows_is_not_followed(files: RunFiles, tmp_path: Path):
    target = tmp_path / "target"
    (files.folder.parent / "one-saved.jsonl").symlink_to(target)
    with pytest.raises(OSError):
        save_row(files, files.folder.parent, [])
    assert not target.exists()
