"""Replay rows of a base on disk: written once, resumed, shared, and edited by hand."""

import json
import time
from threading import Event, Thread

import pytest
from filelock import FileLock

from yrunner.assembly import replay as replay_rows
from yrunner.assembly.replay import DRIFT_ROW_EVERY, FIRST_CHECK, Wanted, written_rows
from yrunner.assembly.run import Run
from yrunner.data.conversation import Message
from yrunner.errors import ModelError, RunError
from yrunner.evaluation.self_replay import ReplayRow
from yrunner.models.load import check_vocabulary
from yrunner.recipe.schema.keep import ReplayWriting

NUMBERS = "zero one two three four five six seven eight nine".split()


def words(number):
    return " ".join(NUMBERS[int(digit)] for digit in f"{number:04}")


class Pen:
    """Writes a row for each number, every fifth one cut off; remembers what it was asked for."""

    batch_size = 16

    def __init__(self):
        self.numbers = []

    def write(self, numbers):
        self.numbers += numbers
        messages = [
            (Message("user", words(n)), Message("assistant", words(n + 1))) for n in numbers
        ]
        return [
            ReplayRow(number, message, finished=bool(number % 5))
            for number, message in zip(numbers, messages, strict=True)
        ]


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path)


@pytest.fixture
def make_run():
    def make(folder):
        (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        (folder / "base").mkdir(exist_ok=True)
        text = "name: x\nmodel: {base: ./base}\ndata: {train: [{file: rows.jsonl}]}\n"
        (folder / "x.yaml").write_text(text)
        run = Run.load(folder / "x.yaml", [f"output={folder / 'outputs' / 'x'}"])
        run.base_key = f"key of {run.base_source}"
        return run

    return make


@pytest.fixture
def pen(monkeypatch):
    pen = Pen()
    monkeypatch.setattr(replay_rows, "ReplayWriter", lambda *_, **__: pen)
    monkeypatch.setattr(Run, "load_base", lambda _: None)
    for name in ("load_tokenizer", "check_vocabulary"):
        monkeypatch.setattr(replay_rows, name, lambda *_, **__: None)
    return pen


def drafts_of(lines):
    return [json.loads(line)["draft"] for line in lines]


def test_replay_rows_and_drift_rows_are_apart_and_the_rest_is_counted(run, pen, capsys):
    written = written_rows(run, ReplayWriting(), Wanted(rows=20, drift_rows=5))
    rows, drift_rows = drafts_of(written.rows), drafts_of(written.drift_rows)
    assert (len(rows), len(drift_rows)) == (20, 5)
    kept = [number for number in pen.numbers if number % 5]
    assert sorted(rows + drift_rows) == sorted({*rows, *drift_rows})
    assert rows == [n for place, n in enumerate(kept) if place % DRIFT_ROW_EVERY][:20]
    dropped = [json.loads(line) for line in written.folder.dropped.read_text().splitlines()]
    assert {row["why"] for row in dropped} == {"unfinished"}
    record = json.loads(written.folder.record.read_text())
    assert record["key"].startswith("key of ") and record["drafts"] == len(pen.numbers)
    assert sum(record["fates"].values()) == len(pen.numbers)
    assert "kept; dropped:" in capsys.readouterr().out


def test_what_is_there_is_not_written_again_and_more_is_added(run, pen):
    few = written_rows(run, ReplayWriting(), Wanted(rows=5, drift_rows=2))
    number = len(pen.numbers)
    assert written_rows(run, ReplayWriting(), Wanted(rows=4)).rows == few.rows[:4]
    assert len(pen.numbers) == number
    many = written_rows(run, ReplayWriting(), Wanted(rows=60, drift_rows=2))
    assert many.rows[:5] == few.rows
    assert many.drift_rows == few.drift_rows
    assert pen.numbers == list(range(len(pen.numbers))), "no draft is written twice"


def test_work_that_was_interrupted_ends_with_the_same_rows(
    run, make_run, pen, monkeypatch, tmp_path_factory
):
    other = make_run(tmp_path_factory.mktemp("other"))
    whole = written_rows(other, ReplayWriting(), Wanted(rows=40)).rows
    saved, saves = replay_rows.write_json, []

    def killed(path, content):
        saves.append(path)
        if len(saves) == 4:
            raise KeyboardInterrupt
        saved(path, content)

    monkeypatch.setattr(replay_rows, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        written_rows(run, ReplayWriting(), Wanted(rows=40))
    monkeypatch.setattr(replay_rows, "write_json", saved)
    assert written_rows(run, ReplayWriting(), Wanted(rows=40)).rows == whole


def test_a_row_that_a_person_took_out_or_changed_stays_as_it_is(run, pen):
    written = written_rows(run, ReplayWriting(), Wanted(rows=10))
    lines = written.rows
    lines[2] = '{"prompt": "by hand", "response": "yes"}'
    written.folder.rows.write_text("\n".join([*lines[:5], *lines[6:]]) + "\n")
    number = len(pen.numbers)
    again = written_rows(run, ReplayWriting(), Wanted(rows=10)).rows
    assert again[2] == lines[2]
    assert lines[5] not in again
    assert len(pen.numbers) == number


def test_another_way_to_write_has_a_folder_of_its_own(run, pen):
    folders = {
        written_rows(run, writing, Wanted(rows=2)).folder.folder
        for writing in (
            ReplayWriting(),
            ReplayWriting(temperature=0.7),
            ReplayWriting(openings=["Why"]),
            ReplayWriting(),
        )
    }
    assert len(folders) == 3


def test_a_base_that_writes_nothing_of_use_ends_it_soon_and_in_one_sentence(
    run, pen, monkeypatch, capsys
):
    monkeypatch.setattr(replay_rows, "find_fault", lambda *_: "loop")
    with pytest.raises(RunError, match=r"the base wrote 0 valid rows instead of 50 \(\d+ loop\)"):
        written_rows(run, ReplayWriting(), Wanted(rows=50))
    assert len(pen.numbers) < FIRST_CHECK + pen.batch_size
    assert not written_rows(run, ReplayWriting(), Wanted(drift_rows=8)).drift_rows, (
        "the run continues"
    )
    assert "the base repeats itself" in capsys.readouterr().err


def test_a_base_with_fewer_embeddings_than_its_tokenizer_has_ids_writes_nothing(
    run, pen, monkeypatch, make_model, capitals_tokenizer
):
    model = make_model()
    model.resize_token_embeddings(len(capitals_tokenizer) - 1)
    monkeypatch.setattr(Run, "load_base", lambda _: model)
    monkeypatch.setattr(replay_rows, "load_tokenizer", lambda *_, **__: capitals_tokenizer)
    monkeypatch.setattr(replay_rows, "check_vocabulary", check_vocabulary)
    with pytest.raises(ModelError, match="Use the tokenizer that belongs to the model"):
        written_rows(run, ReplayWriting(), Wanted(rows=5))
    assert pen.numbers == []


def test_a_run_that_waits_for_another_one_says_so(run, pen, capsys):
    folder = replay_rows.replay_folder(run, ReplayWriting())
    folder.folder.mkdir(parents=True, exist_ok=True)
    is_held = Event()

    def other_run():
        with FileLock(folder.lock):
            is_held.set()
            time.sleep(0.3)

    Thread(target=other_run).start()
    assert is_held.wait(10)
    assert len(written_rows(run, ReplayWriting(), Wanted(1, 0)).rows) == 1
    assert f"waiting for another run that writes in {folder.folder}" in capsys.readouterr().out
