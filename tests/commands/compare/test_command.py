"""`yrun compare` from the recipe to the report, on arms that train in seconds."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_jsonl
from tests.project import write_project, write_recipe
from yrunner.assembly.run import Run
from yrunner.cli import app
from yrunner.commands.compare.command import compare
from yrunner.commands.compare.jobs import Failure
from yrunner.commands.compare.measure import measure_model
from yrunner.commands.compare.points import Measurement
from yrunner.errors import RunError, YRunnerError
from yrunner.storage.run_dir import RunDir, read_json

TRIAL = Path("trial.yaml")
ARMS = Path("outputs/trial/arms")
ANSWER = {"kind": "answer", "max_new_tokens": 8}


def write_trial(project: Path) -> Path:
    """trial.yaml: two arms of eight updates, saved after four and eight, with a listed fault."""
    content = yaml.safe_load((project / "tuned.yaml").read_text("utf-8"))
    content["name"] = "trial"
    content["eval"]["tasks"] = [
        {"name": "learned", "side": "domain", "data": "test.jsonl", **ANSWER},
        {"name": "kept", "side": "general", "data": "validation.jsonl", **ANSWER},
        {"name": "reading", "kind": "perplexity", "side": "general", "data": "validation.jsonl"},
    ]
    write_jsonl(project / "faults.jsonl", [{"row": 2, "kind": "swapped", "right": "Dane."}])
    content["eval"]["faults"] = {"data": "train.jsonl", "list": "faults.jsonl"}
    content["compare"] = {
        "arms": {"nlirg": {}, "plain": {"loss": {"kind": "plain"}}},
        "seeds": [0],
        "checkpoints": "all",
    }
    return write_recipe(project / "trial.yaml", content)


def run_here(noted, jobs):
    """Run each job's commands in this process, which has imported torch already; note them."""
    failures = {}
    for job in jobs:
        for command in job.commands:
            arguments = list(command[3:])
            option = next((word for word in arguments if word.startswith("--")), "")
            noted.append(" ".join((job.name.split("-")[0], arguments[0], option)).strip())
            try:
                app(arguments, standalone_mode=False)
            except YRunnerError as error:
                failures[job.name] = Failure(str(error), job.log)
                break
    return failures


@pytest.fixture
def commands(monkeypatch):
    """What an experiment has run: job, command and option of each."""
    noted = []
    monkeypatch.setattr(
        "yrunner.commands.compare.command.run_jobs",
        lambda what, jobs, places: run_here(noted, jobs),
    )
    return noted


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose trial.yaml was compared once, a copy of it, and what was run for that."""
    folder = tmp_path_factory.mktemp("trial")
    project = folder / "project"
    project.mkdir()
    write_trial(write_project(project))
    noted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(
            "yrunner.commands.compare.command.run_jobs",
            lambda what, jobs, places: run_here(noted, jobs),
        )
        compare(TRIAL, [])
    shutil.copytree(project, folder / "copy")
    return project, noted


@pytest.fixture
def trial(finished, monkeypatch):
    """The recipe of the finished experiment, where every test finds it as it was."""
    project, _ = finished
    shutil.rmtree(project)
    shutil.copytree(project.parent / "copy", project)
    monkeypatch.chdir(project)
    return project / "trial.yaml"


def table():
    return read_json(Path("outputs/trial/compare.json"))


def test_every_arm_is_trained_and_measured_at_every_checkpoint(trial, finished):
    _, noted = finished
    base = ["base train", "base measure --base"]
    assert noted == [*base, "nlirg train", "nlirg measure", "plain train", "plain measure"]
    assert sorted(path.parent.name for path in ARMS.glob("*/model")) == [
        "nlirg-seed-0",
        "plain-seed-0",
    ]
    found = table()
    assert list(found["arms"]) == ["nlirg", "plain"]
    for arm in found["arms"].values():
        assert arm["updates"] == 8
        assert [point["step"] for point in arm["seeds"]["0"]] == [4, 8]
    assert found["notes"] == []
    assert set(found["at_validation_loss"]) == {"nlirg", "plain"}
    assert found["at_validation_loss"]["plain"]["steps"]["0"] <= 8
    measures = {"domain", "general", "memorised"}
    assert set(found["at_the_end"]["plain"]["minus_the_first"]) == measures
    assert {"corrected", "repetition_4"} < set(found["at_the_end"]["plain"]["figures"])
    assert "2 arms" in Path("outputs/trial/compare.html").read_text("utf-8")


def test_what_is_there_is_not_done_again_and_a_new_seed_is_a_new_training(trial, commands, capfd):
    first = table()
    compare(TRIAL, [])
    assert commands == []
    assert table() == first
    said = capfd.readouterr().out
    assert "runs already finished: 2 of 2" in said
    assert "At equal steps" in said
    compare(TRIAL, [], seeds="0,1", only="plain")
    assert commands == ["plain train", "plain measure"]
    points = [read_json(ARMS / f"plain-seed-{seed}" / "measured.json")["points"] for seed in (0, 1)]
    assert points[0] != points[1]


def test_the_last_point_of_a_run_is_what_its_model_says(trial, commands):
    """Without validation the model is that of the last update.

    The micro base answers next to nothing rightly: what tells models apart is repetition.
    """
    compare(TRIAL, ["data.validation=[]", "output=other"], only="plain")
    run = Run.load(TRIAL, ["output=other/arms/plain-seed-0"])
    results = measure_model(run, run.load_result(), run.result_tokenizer, "update 8")
    first, last = Measurement.load(run.folder.measured).points
    assert last.results == results
    assert last.figures["repetition_3"] > 0
    assert last.results.tasks != first.results.tasks


def test_runs_with_other_settings_are_refused_and_replaced_only_when_asked(trial, commands):
    changed = ["train.learning_rate=1e-3"]
    refusal = (
        r"nlirg-seed-0 was trained with other settings: recipe\.train\.learning_rate "
        r"\(and 1 more run\)\. Set them back"
    )
    with pytest.raises(RunError, match=refusal):
        compare(TRIAL, changed)
    assert commands == []
    compare(TRIAL, changed, only="plain", overwrite=True)
    assert commands == ["plain train --overwrite", "plain measure"]


def test_a_run_whose_sort_is_gone_is_refused_with_the_command_that_sorts(trial, commands):
    content = yaml.safe_load(trial.read_text("utf-8"))
    content["compare"]["arms"]["sorted"] = {"data.train": [{"sorted": "rows.yaml"}]}
    rows = {"train": content["data"]["train"]}
    write_recipe(Path("rows.yaml"), {"name": "rows", "model": content["model"], "data": rows})
    write_recipe(trial, content)
    shutil.copytree(ARMS / "plain-seed-0", ARMS / "sorted-seed-0")
    with pytest.raises(
        RunError,
        match=r"sorted-seed-0 was trained .* Run `yrun sort \S+rows\.yaml`, whose result",
    ):
        compare(TRIAL, [], only="sorted")
    assert commands == []


def test_a_failed_arm_leaves_the_others_and_is_tried_again_alone(trial, commands, capfd):
    content = yaml.safe_load(trial.read_text("utf-8"))
    content["compare"]["arms"]["broken"] = {"tuning.targets": ["no_such_module"]}
    write_recipe(trial, content)
    with pytest.raises(
        RunError,
        match=r"1 of 3 runs failed: broken-seed-0: .*no_such_module.*"
        r"Fix the cause and run the same command again",
    ):
        compare(TRIAL, [])
    found = table()
    assert list(found["arms"]) == ["nlirg", "plain"]
    assert "no_such_module" in found["failures"]["broken-seed-0"]
    assert "no_such_module" in Path("outputs/trial/compare.html").read_text("utf-8")
    assert "Failed" in capfd.readouterr().out
    commands.clear()
    with pytest.raises(RunError, match="1 of 3 runs failed"):
        compare(TRIAL, [])
    assert [command.split()[:2] for command in commands] == [["broken", "train"]]


def test_the_last_checkpoint_stays_or_all_and_only_all_can_be_measured_anew(trial, commands):
    assert RunDir(ARMS / "plain-seed-0").saved_steps() == [4, 8]
    compare(TRIAL, ["compare.checkpoints=last"], seeds="1", only="plain")
    assert RunDir(ARMS / "plain-seed-1").saved_steps() == [8]
    commands.clear()
    longer = ["eval.tasks.0.max_new_tokens=9"]
    compare(TRIAL, longer)
    assert commands == ["base measure --base", "nlirg measure", "plain measure"]
    with pytest.raises(RunError, match=r"plain-seed-1 was trained .* eval, or its files"):
        compare(TRIAL, longer, seeds="1", only="plain")


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_end(trial, commands):
    first = table()
    stopped = RunDir(ARMS / "plain-seed-0")
    shutil.rmtree(stopped.model)
    shutil.rmtree(stopped.checkpoint(8))
    stopped.measured.unlink()
    # What an interruption between two checkpoints has left is no point of the curve.
    shutil.copytree(stopped.checkpoint(4), stopped.checkpoint(3))
    half = RunDir(ARMS / "nlirg-seed-0")
    measured = read_json(half.measured)
    measured |= {"points": measured["points"][:1], "complete": False}
    half.measured.write_text(json.dumps(measured))
    compare(TRIAL, [])
    assert commands == ["nlirg measure", "plain train --resume", "plain measure"]
    assert table() == first


def test_a_base_that_is_missing_is_trained_first_and_once(project, commands):
    write_trial(project)
    compare(TRIAL, ["train.max_steps=1"], vary=["data.system=a,b"])
    bases = ["base train", "base measure --base", "base measure --base"]
    assert commands[:3] == bases, "what is measured differs by the system message"
    assert not any(command.startswith("base") for command in commands[3:])


def test_a_key_that_changes_the_number_of_updates_is_noted_in_table_and_report(
    trial, commands, capfd
):
    compare(TRIAL, ["train.epochs=1"], vary=["train.batch_size=4,8"])
    note = "compared with batch_size-4, batch_size-8 has 2 updates instead of 4"
    assert table()["notes"] == [note]
    assert note in Path("outputs/trial/compare.html").read_text("utf-8")
    said = capfd.readouterr().out
    assert said.count(f"note: {note}") == 2, "before the hours and after them"
    assert "After the last update" in said


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["eval.tasks.1.side=domain", "eval.tasks.2.side=domain"], "no task of side general"),
        (["eval.faults.list=train.jsonl"], 'its "row" is nothing'),
        (["data.max_length=20"], "cannot be used"),
    ],
)
def test_what_cannot_be_compared_is_found_before_anything_is_trained(
    project, commands, overrides, complaint
):
    write_trial(project)
    with pytest.raises(YRunnerError, match=complaint):
        compare(TRIAL, overrides)
    assert commands == []
    assert not ARMS.exists() or not list(ARMS.glob("*seed*"))


def test_a_new_model_has_nothing_to_forget(project, commands):
    with pytest.raises(YRunnerError, match="builds a new model, which cannot forget anything"):
        compare(Path("base.yaml"), [], vary=["train.epochs=1,2"])


def test_the_command_runs_processes_of_its_own_whose_logs_can_be_repeated(trial, capfd, forks):
    app(["compare", "trial.yaml", "--arms", "plain", "--seeds", "1"], standalone_mode=False)
    assert "updates of 1 run: 8/8 (100 %)" in capfd.readouterr().err
    assert list(table()["arms"]["plain"]["seeds"]) == ["1"]
    log = (ARMS / "plain-seed-1.log").read_text("utf-8")
    assert "yrunner.cli train trial.yaml" in log
    assert "yrunner.cli measure trial.yaml" in log
