"""Cross-fitting, against `yrun train` on the other rows, and what is kept of it."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import write_jsonl
from yrunner.assembly.run import Run
from yrunner.commands.sort import cross_fit as story
from yrunner.commands.sort.cross_fit import cross_fit, make_folds
from yrunner.commands.train import train
from yrunner.errors import YRunnerError
from yrunner.scoring.measure import TokenScores, score_tokens
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import RunDir

SORT = ["sort.cross_fit=2"]


def run(*overrides: str) -> list[TokenScores]:
    tuned = Run.load(Path("tuned.yaml"), [*SORT, *overrides])
    return cross_fit(tuned, tuned.folder.folder.absolute() / "cross_fit")


def losses(scores: list[TokenScores]) -> torch.Tensor:
    return torch.cat([scored.loss_N for scored in scores])


def kept_files() -> dict[str, bytes]:
    folder = Path("outputs/tuned/cross_fit")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.scores"))
    }


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that each training learns from; grows while the test runs."""
    seen: list[int] = []

    def make_and_count(run, model, arguments, task):
        seen.append(len(task.train))
        return original(run, model, arguments, task)

    original = story.make_trainer
    monkeypatch.setattr(story, "make_trainer", make_and_count)
    return seen


@pytest.mark.parametrize(
    "tuning",
    [
        "tuning={kind: lora, rank: 4, alpha: 8}",
        "tuning={kind: freeze, train_top: 0.5}",
        "tuning={kind: full}",
    ],
)
def test_a_row_is_scored_as_by_a_model_that_yrun_trained_on_the_other_folds(trained_base, tuning):
    scores = run(tuning)
    tuned = Run.load(Path("tuned.yaml"), [*SORT, tuning])
    rows = tuned.dataset.train
    folds = make_folds(row_hashes(rows), 2, tuned.recipe.seed)
    lines = Path("train.jsonl").read_text("utf-8").splitlines()
    others = [json.loads(line) for line, fold in zip(lines, folds, strict=True) if fold != 1]
    write_jsonl(Path("others.jsonl"), others)
    alone = [tuning, "name=alone", "train.epochs=10", "data.validation=[]"]
    alone.append("data.train=[{file: others.jsonl}]")
    train(Path("tuned.yaml"), alone, resume=False, overwrite=False)
    model = tuned.load_model(RunDir(Path("outputs/alone")).model)
    held_out = [place for place, fold in enumerate(folds) if fold == 1]
    expected = score_tokens(
        model, [rows[place] for place in held_out], pad_token_id=0, batch_size=1
    )
    for place, scored in zip(held_out, expected, strict=True):
        torch.testing.assert_close(scores[place].loss_N, scored.loss_N, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores[place].entropy_N, scored.entropy_N, atol=1e-4, rtol=1e-4)


def test_scores_stand_in_the_order_of_the_rows_and_know_their_places(trained_base):
    scores = run()
    assert [scored.origin.row for scored in scores] == list(range(1, 17))
    assert torch.isfinite(losses(scores)).all()


def test_a_finished_fold_is_not_trained_again(trained_base, trainings, capsys):
    first = run()
    assert trainings == [8, 8]
    for path in Path("outputs/tuned/cross_fit/fold-2").iterdir():
        path.unlink()
    capsys.readouterr()
    assert torch.equal(losses(run()), losses(first))
    assert trainings == [8, 8, 8]
    said = capsys.readouterr().out
    assert "cross-fit: 1 of 2 folds are scored already" in said
    assert "fold 2 of 2" in said
    assert "fold 1 of 2" not in said


@pytest.mark.parametrize("kept_share", [0.02, 0.5, 0.99])
def test_killed_in_the_middle_of_a_fold_it_ends_with_the_same_files(
    trained_base, trainings, kept_share
):
    run()
    whole = kept_files()
    second = next(Path("outputs/tuned/cross_fit/fold-2").iterdir())
    second.write_bytes(second.read_bytes()[: int(kept_share * second.stat().st_size)])
    run()
    assert kept_files() == whole
    assert trainings == [8, 8, 8]


def test_other_settings_of_the_training_train_again_and_those_of_the_order_do_not(
    trained_base, trainings
):
    run()
    run("sort.order=ascending", "sort.drop_share=0.1", "train.log_every=3", "train.epochs=9")
    assert len(trainings) == 2
    run("train.learning_rate=1e-3")
    assert len(trainings) == 4
    run("train.learning_rate=1e-3", "sort.cross_fit_steps=3")
    assert len(trainings) == 6


def test_a_changed_row_trains_every_fold_again(trained_base, trainings):
    run()
    rows = [json.loads(line) for line in Path("train.jsonl").read_text("utf-8").splitlines()]
    rows[3]["output"] += " Indeed."
    write_jsonl(Path("train.jsonl"), rows)
    run()
    assert len(trainings) == 4


def test_its_lines_say_fold_update_loss_and_time_left(trained_base, capsys):
    run("sort.cross_fit_steps=8")
    said = capsys.readouterr().out
    assert "cross-fit, fold 1 of 2: 8 updates on 8 rows, then scoring 8 others" in said
    for update in (2, 4, 6, 8):
        assert f"cross-fit, fold 2 of 2: update {update}/8  loss " in said
    assert said.rstrip().endswith("cross-fit, fold 2 of 2: scored, 0:00 left for all folds")


def test_ten_passes_are_made_unless_a_number_of_updates_is_given(trained_base, capsys):
    run()
    # Eight rows in batches of four.
    assert "fold 1 of 2: 20 updates on 8 rows" in capsys.readouterr().out


def test_it_leaves_no_checkpoint_and_no_model(trained_base):
    run()
    files = [path for path in Path("outputs/tuned").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".scores"}


def test_too_few_different_rows_are_refused(trained_base):
    row = {"instruction": "Capital of Aru?", "output": "Belo is the capital."}
    write_jsonl(Path("train.jsonl"), [row] * 5)
    with pytest.raises(YRunnerError, match="2 folds need 2 different rows; there are 1"):
        run()
