"""Replay rows of a base on disk: written once, resumed, shared, and edited by hand."""

import json
import time
from threading import Event, Thread

import pytest
from filelock import FileLock

from yrunner.assembly import replay as replay_rows
from yrunner.assembly import replay_store
from yrunner.assembly.replay import wanted_rows, writing_note, written_rows
from yrunner.assembly.replay_store import FIRST_CHECK, LEAST_ROWS, Wanted
from yrunner.assembly.run import Run
from yrunner.data.conversation import Message
from yrunner.errors import ModelError, RunError
from yrunner.evaluation.self_replay import ReplayRow
from yrunner.models.load import check_vocabulary
from yrunner.recipe.schema.keep import ReplayWriting

NUMBERS = "zero one two three four five six seven eight nine".split()


def words(number):
    return f"row {number} says " + " ".join(NUMBERS[int(digit)] for digit in f"{number:04}")


class Pen:
    """Writes a row for each draft, every fifth one cut off; remembers what it was asked for."""

    in_batch = 16

    def __init__(self):
        self.drafts = []

    def write(self, next_draft, *, advance, is_over):
        running = []
        while not is_over():
            while len(running) < self.in_batch and (draft := next_draft()) is not None:
                running.append(draft)
                self.drafts.append(draft)
            if not running:
                return
            # Some end sooner than those before them.
            running.sort(key=lambda draft: (draft.number // 8, draft.number % 7))
            draft = running.pop(0)
            n = draft.number + 5000 * (draft.series == "rows")
            messages = (Message("user", words(n)), Message("assistant", words(n + 1)))
            advance(10)
            yield ReplayRow(draft, messages, finished=bool(draft.number % 5))

    @property
    def num_drafts(self):
        return len(self.drafts)


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path)


@pytest.fixture
def make_run():
    def make(folder):
        (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        (folder / "base").mkdir(exist_ok=True)
        (folder / "base/config.json").write_text("{}")
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


def test_replay_rows_and_drift_rows_are_apart_and_no_more_are_written_than_needed(run, pen):
    written = written_rows(run, ReplayWriting(), Wanted(rows=20, drift_rows=5))
    assert (len(written.rows), len(written.drift_rows)) == (20, 5)
    texts = [json.loads(line)["messages"] for line in [*written.rows, *written.drift_rows]]
    assert len({str(text) for text in texts}) == 25
    assert drafts_of(written.rows) == list(range(20))
    assert drafts_of(written.drift_rows) == list(range(5))
    assert pen.num_drafts <= 25 + pen.in_batch // 2
    record = json.loads(written.folder.record.read_text())
    assert record["key"].startswith("key of ") and record["drafts"] == {"rows": 20, "held_out": 5}
    assert sum(record["fates"].values()) == 25


def test_rows_that_only_measure_drift_cost_no_others(run, pen):
    written = written_rows(run, ReplayWriting(), Wanted(drift_rows=16))
    assert len(written.drift_rows) == 16
    assert not written.folder.rows.exists()
    assert {draft.series for draft in pen.drafts} == {"held_out"}


@pytest.mark.parametrize("in_batch", [1, 3, 50])
def test_which_rows_there_are_does_not_depend_on_what_ends_first(
    run, pen, make_run, tmp_path_factory, in_batch
):
    wanted = Wanted(rows=30, drift_rows=6)
    expected = written_rows(run, ReplayWriting(), wanted)
    pen.in_batch = in_batch
    other = written_rows(make_run(tmp_path_factory.mktemp("other")), ReplayWriting(), wanted)
    assert other.rows == expected.rows
    assert other.drift_rows == expected.drift_rows


def test_an_unfinished_row_is_kept_and_counted_and_text_takes_only_finished_ones(run, pen, capsys):
    by_kl = written_rows(run, ReplayWriting(), Wanted(rows=20))
    unfinished = [json.loads(line)["draft"] for line in by_kl.rows if "unfinished" in line]
    assert unfinished == [0, 5, 10, 15]
    assert "20 drafts: 20 kept, 4 of them unfinished (no end mark)" in capsys.readouterr().out
    by_text = written_rows(run, ReplayWriting(), Wanted(rows=20, finished=True))
    assert drafts_of(by_text.rows) == [n for n in range(30) if n % 5][:20]
    number = pen.num_drafts
    again = written_rows(run, ReplayWriting(), Wanted(rows=20))
    assert again.rows == by_kl.rows and pen.num_drafts == number


@pytest.mark.parametrize(
    ("keep", "finished"),
    [
        ("keep={kind: self_replay}", False),
        ("keep={kind: self_replay, by: text}", True),
        ("keep={kind: ewc}", False),
        ("keep={kind: none}", False),
    ],
)
def test_only_what_is_learned_as_text_needs_an_end(tmp_path, make_run, keep, finished):
    make_run(tmp_path)
    assert wanted_rows(Run.load(tmp_path / "x.yaml", [keep]).recipe).finished is finished


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["keep={kind: none}"], None),
        (["keep={kind: none}", "data.validation_share=0.5"], "writes 16 rows for drift, unless"),
        (["keep={kind: self_replay}"], "writes 64 rows for keep, unless they are there; in at "),
        (
            ["keep={kind: ewc, rows: 1, write_minutes: 1}"],
            "1 row for keep, unless they are there; ",
        ),
        (["keep={kind: ewc, rows: 1, write_minutes: 1}"], "in at most 1 minute (keep.write_mi"),
        (["keep={kind: ewc, file: rows.jsonl}"], None),
        (["keep={kind: rows, file: rows.jsonl}"], None),
        (["keep={kind: self_replay}"], "A few dozen general instructions of your own are better"),
    ],
)
def test_check_can_say_what_the_base_writes_and_what_to_use_instead(
    tmp_path, make_run, changes, said
):
    make_run(tmp_path)
    note = writing_note(Run.load(tmp_path / "x.yaml", changes).recipe)
    assert note is None if said is None else said in note


def test_what_is_there_is_not_written_again_and_more_is_added(run, pen):
    few = written_rows(run, ReplayWriting(), Wanted(rows=5, drift_rows=2))
    number = pen.num_drafts
    assert written_rows(run, ReplayWriting(), Wanted(rows=4)).rows == few.rows[:4]
    assert pen.num_drafts == number
    many = written_rows(run, ReplayWriting(), Wanted(rows=60, drift_rows=2))
    assert many.rows[:5] == few.rows
    assert many.drift_rows == few.drift_rows
    assert drafts_of(many.rows) == list(range(60))


class Clock:
    """A second passes whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(replay_store, "time", clock)
    return clock


def test_out_of_time_there_are_fewer_rows_and_more_time_adds_to_them(run, pen, clock, capsys):
    short, long = ReplayWriting(write_minutes=1), ReplayWriting(write_minutes=60)
    pen.in_batch = 2
    wanted = Wanted(rows=100, drift_rows=2)
    few = written_rows(run, short, wanted)
    assert LEAST_ROWS <= len(few.rows) < 100 and len(few.drift_rows) == 2
    said = capsys.readouterr()
    assert f"{len(few.rows)} replay rows instead of 100 in 1 minute (keep.write" in said.err
    number = pen.num_drafts
    assert written_rows(run, short, wanted).rows == few.rows
    assert pen.num_drafts == number, "the time is over for this recipe"
    all_rows = written_rows(run, long, wanted)
    assert len(all_rows.rows) == 100 and all_rows.rows[: len(few.rows)] == few.rows
    assert all_rows.folder.folder == few.folder.folder
    assert written_rows(run, ReplayWriting(write_minutes=90), wanted).rows == all_rows.rows


def test_a_key_that_a_recipe_without_keep_does_not_have_is_not_named(run, pen, clock, capsys):
    pen.in_batch = 1
    written_rows(run, ReplayWriting(write_minutes=0.1), Wanted(drift_rows=50))
    said = capsys.readouterr().err
    assert "drift rows instead of 50 in 0.1 minutes" in said and "keep.write" not in said


def test_no_row_is_begun_that_the_time_does_not_suffice_for(run, pen, clock):
    pen.in_batch = 8
    written_rows(run, ReplayWriting(write_minutes=2), Wanted(rows=200))
    record = json.loads(replay_rows.replay_folder(run, ReplayWriting()).record.read_text())
    assert LEAST_ROWS < record["drafts"]["rows"] <= pen.num_drafts <= record["drafts"]["rows"] + 2


def test_too_little_time_is_an_error_and_what_was_written_stays(run, pen, clock):
    pen.in_batch = 1
    short = ReplayWriting(write_minutes=0.1)
    with pytest.raises(
        RunError, match=r"valid rows instead of 50 in 0.1 minutes \(keep.write_minutes\)"
    ) as raised:
        written_rows(run, short, Wanted(rows=50))
    assert "raise keep.write_minutes" in str(raised.value.remedy)
    folder = replay_rows.replay_folder(run, short)
    there = folder.rows.read_text().splitlines()
    assert 0 < len(there) < LEAST_ROWS
    more = written_rows(run, ReplayWriting(write_minutes=60), Wanted(rows=50)).rows
    assert more[: len(there)] == there and len(more) == 50


def test_few_rows_may_be_all_that_is_wanted(run, pen, clock):
    assert len(written_rows(run, ReplayWriting(write_minutes=1), Wanted(rows=2)).rows) == 2


def test_progress_says_how_fast_and_how_long_and_never_more_than_all(run, pen, clock, capsys):
    written_rows(run, ReplayWriting(), Wanted(rows=40, drift_rows=4))
    said = capsys.readouterr()
    assert "44 rows of about 100 tokens at" in said.out and "tokens/s take about" in said.out
    lines = [line for line in said.err.splitlines() if "writes replay rows" in line]
    assert lines[0].endswith("0/44") and "44/44 (100 %)" in lines[-1]
    assert all("tokens/s" in line and " left" in line for line in lines[1:-1])


def test_work_that_was_interrupted_ends_with_the_same_rows(
    run, make_run, pen, monkeypatch, tmp_path_factory
):
    other = make_run(tmp_path_factory.mktemp("other"))
    wanted = Wanted(rows=40, drift_rows=3)
    whole = written_rows(other, ReplayWriting(), wanted)
    saved, saves = replay_store.write_json, []

    def killed(path, content):
        saves.append(path)
        if len(saves) == 14:
            raise KeyboardInterrupt
        saved(path, content)

    monkeypatch.setattr(replay_store, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        written_rows(run, ReplayWriting(), wanted)
    monkeypatch.setattr(replay_store, "write_json", saved)
    again = written_rows(run, ReplayWriting(), wanted)
    assert (again.rows, again.drift_rows) == (whole.rows, whole.drift_rows)


def test_a_row_that_a_person_took_out_or_changed_stays_as_it_is(run, pen):
    written = written_rows(run, ReplayWriting(), Wanted(rows=10))
    lines = written.rows
    lines[2] = '{"prompt": "by hand", "response": "yes"}'
    written.folder.rows.write_text("\n".join([*lines[:5], *lines[6:]]) + "\n")
    number = pen.num_drafts
    again = written_rows(run, ReplayWriting(), Wanted(rows=10)).rows
    assert again[2] == lines[2]
    assert lines[5] not in again
    assert pen.num_drafts == number


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
    monkeypatch.setattr(replay_store, "find_fault", lambda *_: "loop")
    with pytest.raises(RunError, match=r"the base wrote 0 valid rows instead of 50 \(\d+ loop\)"):
        written_rows(run, ReplayWriting(), Wanted(rows=50))
    assert pen.num_drafts < FIRST_CHECK + pen.in_batch
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
    assert pen.drafts == []


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
