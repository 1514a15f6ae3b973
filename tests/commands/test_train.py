"""`yrun train` from recipe to model, as a person would use it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_jsonl
from tests.yrun_process import ERRORS, SAID, ending, start_yrun, wait_until
from yrunner.commands.train import train
from yrunner.errors import DataError, MissingError, RunError, YRunnerError
from yrunner.storage.run_dir import RunDir


def run(recipe="tuned.yaml", *overrides, resume=False, overwrite=False):
    train(Path(recipe), list(overrides), resume=resume, overwrite=overwrite)


def records(name="tuned"):
    return [
        json.loads(line)
        for line in Path(f"outputs/{name}/metrics.jsonl").read_text().split("\n")[:-1]
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the results of both recipes are kept, which are the same for every test."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(project, kept, capfd):
    """Both recipes trained, and what was printed."""
    if not (kept / "printed").exists():
        run()
        shutil.copytree(project / "outputs", kept / "outputs")
        (kept / "printed").write_text(capfd.readouterr().out, "utf-8")
    else:
        shutil.copytree(kept / "outputs", project / "outputs")
    return (kept / "printed").read_text("utf-8")


def test_a_missing_base_is_trained_first_and_the_run_leaves_everything(trained, project):
    assert "the base base has not been trained yet: training it first" in trained
    folder = project / "outputs" / "tuned"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.resolved.yaml",
        "environment.json",
        "fingerprint.json",
        "data_report.json",
        "metrics.jsonl",
        "base.json",
        "before.json",
        "after.json",
        "checkpoints",
        "model",
        "report.html",
        "result.json",
    }
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    report = json.loads((folder / "data_report.json").read_text())
    assert [(file["rows"], file["kept"]) for file in report["files"]] == [(16, 16), (4, 4)]
    needed = {"step", "epoch", "loss", "weighted_loss", "mean_weight", "zone_easy"}
    needed |= {"zone_learning", "zone_hard", "zone_refused", "learning_rate", "grad_norm"}
    needed |= {"targets", "targets_per_second"}
    assert all(needed <= set(row) for row in records() if "loss" in row)
    assert [row["epoch"] for row in records() if "eval_loss" in row] == [1.0, 2.0]


def test_what_is_printed_tells_the_run_from_rows_to_result(trained):
    for said in (
        r"train\.jsonl +train +alpaca +16 +16",
        r"trained +\d[\d,]* of them \(\d",
        r"updates +8 \(2 epochs, 4 examples each\)",
        r"step 8/8 +epoch 2\.00 +loss \d",
        r"capitals +domain +4 ",
        r"model: +\S+outputs/tuned/model",
    ):
        assert re.search(said, trained), said
    assert "\x1b" not in trained, "no control characters without a terminal"


def test_the_saved_adapter_loads_in_the_three_lines_of_its_card(trained, project, monkeypatch):
    folder = project / "outputs" / "tuned" / "model"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    monkeypatch.chdir(folder)
    loaded: dict[str, Any] = {}
    exec(code, loaded)  # in a fresh process: tests/models/test_export.py
    assert type(loaded["model"]).__name__ == "PeftModelForCausalLM"
    assert loaded["tokenizer"].chat_template


def test_the_report_shows_curves_zones_and_answers(trained, project):
    page = (project / "outputs" / "tuned" / "report.html").read_text("utf-8")
    for shown in ("Loss", "Zones", "Weight by loss", "Learning rate", "Answers: capitals"):
        assert shown in page
    assert page.count("<svg") >= 4


def test_a_run_never_overwrites_another(trained):
    with pytest.raises(RunError, match="already holds a run"):
        run()
    run(overwrite=True)


def test_the_base_is_used_again_until_it_or_its_data_changes(trained, project, change, capfd):
    run(overwrite=True)
    assert "training it first" not in capfd.readouterr().out
    change("base.yaml", train__learning_rate=2e-2)
    run(overwrite=True)
    said = "the base base has changed (recipe.train.learning_rate): training it again"
    assert said in capfd.readouterr().out
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    write_jsonl(project / "train.jsonl", rows[:12])
    run(overwrite=True)
    assert "the base base has changed (files." in capfd.readouterr().out


def test_a_finished_run_is_not_trained_again_by_resume(trained, capfd):
    run(resume=True)
    assert "tuned is finished" in capfd.readouterr().out


def test_resume_names_what_was_changed_since(trained, project, change):
    change("tuned.yaml", train__learning_rate=5e-3, loss__x0=1.5)
    with pytest.raises(RunError, match=r"recipe\.loss\.x0, recipe\.train\.learning_rate"):
        run(resume=True)


def test_resume_without_a_run_says_so(project):
    with pytest.raises(RunError, match=r"has no run to resume\. Start without --resume"):
        run("base.yaml", resume=True)


def test_faulty_rows_stop_the_run_before_anything_is_written(project, change):
    with (project / "train.jsonl").open("a") as file:
        file.write('{"instruction": "cut off\n{"instruction": 7, "output": "a"}\n')
    with pytest.raises(YRunnerError) as caught:
        run("base.yaml")
    message = str(caught.value)
    assert "2 rows cannot be used" in message
    assert "train.jsonl row 17: invalid JSON" in message
    assert 'row 18: "instruction" is a number, not text' in message
    assert "data.invalid: drop" in message
    assert not RunDir(project / "outputs" / "base").is_used()
    run("base.yaml", "data.invalid=drop")
    report = json.loads((project / "outputs/base/data_report.json").read_text())
    assert report["files"][0]["refused"] == {"unreadable": 1, "wrong_type": 1}
    assert [row["row"] for row in report["files"][0]["refusals"]] == [17, 18]


def test_what_would_fail_after_the_base_is_found_before_it(project, change):
    change("tuned.yaml", data__train=[{"file": "tuned_rows.jsonl"}])
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    write_jsonl(project / "tuned_rows.jsonl", rows)
    with pytest.raises(YRunnerError, match=r"tuned_rows\.jsonl row 2"):
        run()
    change("tuned.yaml", train__trackers=["swanlab"])
    with pytest.raises(MissingError, match="swanlab"):
        run()
    assert not RunDir(project / "outputs" / "base").is_used()


def test_texts_are_learned_by_cpt_and_refused_by_sft(trained_base, change):
    (trained_base / "texts.txt").write_text("A first document.\nA second one.\n" * 4)
    change("tuned.yaml", data__train=[{"file": "texts.txt"}], eval__tasks=[])
    with pytest.raises(DataError, match=r"plain texts.*Set train\.stage to cpt"):
        run()
    run("tuned.yaml", "train.stage=cpt")
    targets = sum(row["targets"] for row in records() if "loss" in row)
    report = json.loads(Path("outputs/tuned/data_report.json").read_text())
    assert targets == 2 * report["files"][0]["targets"]


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "freeze", "train_top": 0.5}])
def test_every_tuning_learns(trained_base, change, tuning):
    change("tuned.yaml", tuning=tuning, train__epochs=4, loss={"kind": "plain"})
    run()
    losses = [row["loss"] for row in records() if "loss" in row]
    assert losses[-1] < losses[0]


def test_token_batches_learn_every_target_of_the_data_once_per_epoch(trained_base):
    run("tuned.yaml", "train.token_batch=5")
    report = json.loads(Path("outputs/tuned/data_report.json").read_text())
    assert sum(row.get("targets", 0) for row in records()) == 2 * report["files"][0]["targets"]


def test_a_share_of_the_rows_is_set_aside_for_validation(project, capfd):
    run("base.yaml", "data.validation_share=0.25")
    assert "4 examples set aside for validation" in capfd.readouterr().out
    assert any("eval_loss" in row for row in records("base"))


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_adds_it(project):
    with pytest.raises(MissingError, match=r"swanlab.*pip install 'yrunner\[swanlab\]'"):
        run("base.yaml", "train.trackers=[swanlab]")


def test_the_same_seed_gives_the_same_model(project):
    run("base.yaml")
    run("base.yaml", "output=outputs/again")
    one, two = (Path(f"outputs/{name}/model/model.safetensors") for name in ("base", "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_says_how_to_go_on_and_resumes(project, change, number, code):
    change("base.yaml", train__epochs=200, train__log_every=1)
    process = start_yrun("train", "base.yaml")
    metrics = project / "outputs" / "base" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    os.kill(process.pid, number)
    assert ending(process) == code
    errors = ERRORS.read_text()
    assert re.search(r"update \d+ is saved in .*outputs/base\. Continue with: yrun", errors)
    assert "Traceback" not in errors
    steps = [int(path.name[5:]) for path in (project / "outputs/base/checkpoints").iterdir()]
    again = start_yrun("train", "base.yaml", "--resume")
    # It must go on after the saved update.
    wait_until(lambda: f"step {max(steps) + 1}/400" in SAID.read_text(), again)
    again.kill()
    again.join()


def test_a_project_that_was_moved_is_not_trained_anew(trained, project, monkeypatch, capfd):
    moved = project.with_name(f"{project.name}-moved")
    project.rename(moved)
    monkeypatch.chdir(moved)
    run(overwrite=True)
    assert "training it again" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "tuning",
    [{"kind": "full"}, {"kind": "freeze", "train_top": 0.5}, {"kind": "lora", "rank": 4}],
    ids=lambda tuning: tuning["kind"],
)
def test_every_tuning_runs_in_bfloat16(trained_base, change, tuning):
    change("tuned.yaml", tuning=tuning, model__dtype="bfloat16")
    run()
    assert Path("outputs/tuned/report.html").exists()
