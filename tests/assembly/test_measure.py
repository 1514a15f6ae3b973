"""What `yrun train` measures before and after a training, within its budget."""

from pathlib import Path

import pytest

from tests.conftest import questions, write_jsonl
from yrunner.assembly import measure
from yrunner.assembly.measure import Measured
from yrunner.assembly.run import Run
from yrunner.commands.train import train

RUN = Path("outputs/tuned")


def train_on(number: int, *overrides: str) -> tuple[Measured, Measured]:
    rows = [{"instruction": question, "output": answer} for question, answer in questions(number)]
    write_jsonl(Path("train.jsonl"), rows)
    write_jsonl(Path("test.jsonl"), rows)
    train(Path("tuned.yaml"), ["data.validation=[]", *overrides], resume=False, overwrite=True)
    return Measured.load(RUN / "before.json"), Measured.load(RUN / "after.json")


@pytest.fixture
def seconds_of_a_step(monkeypatch):
    """How long it takes to write a token, as a measurement that a test can set."""
    seconds = [0.0]
    monkeypatch.setattr(measure, "_time_step", lambda *_: seconds[0])
    return seconds


def test_without_a_budget_all_questions_and_the_first_rows_are_measured(trained_base):
    before, after = train_on(40, "eval.budget=null", "train.max_steps=1")
    assert before.rows == after.rows == list(range(40))
    assert len(before.answers["capitals"]) == len(after.answers["capitals"]) == 40
    assert before.asked is None


def test_a_short_training_is_measured_on_a_few_rows_from_all_over_the_file(trained_base, capfd):
    before, after = train_on(40, "eval.budget=0.05", "train.max_steps=1")
    assert before.rows == after.rows == [0, 10, 20, 30]
    targets = [len(it.target_positions) for it in Run.load(Path("tuned.yaml"), []).dataset.train]
    assert len(before.token_losses) == sum(targets[row] for row in before.rows)
    assert "losses of 4 of 40 rows" in capfd.readouterr().out.replace("\n", " ")


def test_a_longer_training_is_measured_on_more_rows(trained_base):
    few, _ = train_on(40, "eval.budget=0.05", "train.epochs=1")
    more, _ = train_on(40, "eval.budget=0.05", "train.epochs=12")
    assert len(few.rows) == 4
    # A twentieth of two passes' work in each of 12 epochs, and a quarter of that for this measure.
    assert len(more.rows) == int(40 * 12 * 2 * 0.05 / 4)


def test_as_many_questions_are_asked_as_there_is_time_to_answer_twice(
    trained_base, seconds_of_a_step, monkeypatch, capfd
):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 1000.0)
    # 8 tokens each, 16 answers at once: 5.68 batches of 88 seconds fit twice into 1,000.
    seconds_of_a_step[0] = 88 / 8
    before, after = train_on(100, "eval.budget=1e-9", "train.max_steps=1")
    assert len(before.asked["capitals"]) == 64, "the power of two below 5.68 batches of 16"
    assert before.asked == after.asked
    for measured in (before, after):
        assert [row.question for row in measured.answers["capitals"]] == [
            questions(100)[number][0] for number in before.asked["capitals"]
        ]
    assert '64 of 100 questions of "capitals"' in capfd.readouterr().out.replace("\n", " ")


def test_answers_that_take_too_long_are_left_to_eval(trained_base, seconds_of_a_step, capfd):
    seconds_of_a_step[0] = 3600.0
    before, after = train_on(40, "eval.budget=0.05", "train.max_steps=1")
    assert before.answers == after.answers == {}
    said = capfd.readouterr().out.replace("\n", " ")
    assert 'none of 40 questions of "capitals"; yrun eval asks all' in said
    assert "Answers:" not in (RUN / "report.html").read_text("utf-8")


def test_later_runs_ask_the_same_questions_so_that_kept_answers_are_used_again(
    trained_base, seconds_of_a_step, monkeypatch, capfd
):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 1000.0)
    seconds_of_a_step[0] = 12.0
    first, _ = train_on(100, "eval.budget=1e-9", "train.max_steps=1")
    seconds_of_a_step[0] = 11.0  # another day, another load
    capfd.readouterr()
    second, _ = train_on(100, "eval.budget=1e-9", "train.max_steps=1")
    assert first.asked == second.asked
    assert "base results of an earlier run: capitals" in capfd.readouterr().out.replace("\n", " ")
