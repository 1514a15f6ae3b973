"""What counts as a change of a recipe since its run."""

import json
from pathlib import Path

import pytest

from yrunner.assembly.identity import changes_since, fingerprint
from yrunner.assembly.record import check_resume
from yrunner.assembly.run import Run
from yrunner.recipe.load import load_recipe
from yrunner.storage.run_dir import RunDir, write_json

LEGAL = Path(__file__).parents[2] / "recipes" / "legal_sft.yaml"


@pytest.fixture
def made_by_an_older_version(tmp_path):
    """A run folder of legal_sft whose recipe, and whose base's, did not know some keys yet."""
    run_dir = RunDir(tmp_path)
    known = json.loads(json.dumps(fingerprint(load_recipe(LEGAL))))
    for part in (known, known["base"]):
        del part["recipe"]["loss"]["normalize"]
        del part["recipe"]["train"]["learning_rate"]
        del part["recipe"]["data"]["train"][0]["format"]
    write_json(run_dir.fingerprint, known)
    return run_dir


def test_a_new_key_at_its_default_is_no_change(made_by_an_older_version):
    run_dir, recipe = made_by_an_older_version, load_recipe(LEGAL)
    # Both recipes set a learning rate of their own.
    assert changes_since(run_dir, recipe) == [
        "base.recipe.train.learning_rate",
        "recipe.train.learning_rate",
    ]


@pytest.mark.parametrize("override", ["loss.normalize=weights", "loss={kind: plain}"])
def test_a_new_key_with_a_value_of_its_own_is_a_change(made_by_an_older_version, override):
    changes = changes_since(made_by_an_older_version, load_recipe(LEGAL, [override]))
    assert any(change.startswith("recipe.loss") for change in changes)


@pytest.mark.parametrize(
    ("metric", "changed"), [("eval_loss", []), ("drift", ["recipe.drift.rows"])]
)
def test_drift_rows_matter_only_if_drift_may_stop_the_run(tmp_path, metric, changed):
    stopping = f"train.early_stopping={{metric: {metric}, patience: 2}}"
    run_dir = RunDir(tmp_path)
    write_json(run_dir.fingerprint, fingerprint(load_recipe(LEGAL, [stopping])))
    other = load_recipe(LEGAL, [stopping, "drift.rows=8"])
    assert changes_since(run_dir, other) == changed


def test_a_run_may_resume_with_early_stopping_on_drift(tmp_path):
    stopping = "train.early_stopping={metric: drift, patience: 2}"
    run = Run.load(LEGAL, [f"output={tmp_path}", "drift.rows=8", stopping])
    write_json(run.folder.fingerprint, fingerprint(load_recipe(LEGAL, ["drift.rows=8"])))
    check_resume(run)
