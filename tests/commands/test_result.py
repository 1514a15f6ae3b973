"""Which update `model/` is: the best by validation or the last, and everyone says which."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_jsonl
from yrunner.assembly.report import result_in_words, warn_of_early_result
from yrunner.assembly.run import Run
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.storage.run_dir import write_json
from yrunner.training.metrics import read_metrics, validation_losses

RECIPE = Path("tuned.yaml")
LONG = ["train.epochs=4", "train.learning_rate=0.05", "train.checkpoint.keep=9"]
WEIGHTS = "adapter_model.safetensors"


def trained(*overrides):
    arguments = [*LONG, *overrides]
    train(RECIPE, arguments, resume=False, overwrite=False)
    return Run.load(RECIPE, arguments), arguments


def same_weights(one, other):
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_or_the_last_update_is_the_result_as_the_recipe_says(trained_base, capfd):
    # Validation rows that contradict the training rows: the better it learns, the worse they fare.
    rows = [{"instruction": "Which?", "output": f"{number}%#{number}"} for number in range(4)]
    write_jsonl(trained_base / "validation.jsonl", rows)
    run, arguments = trained()
    losses = validation_losses(read_metrics(run.folder.metrics))
    best, last = min(losses, key=losses.get), max(losses)
    assert best < last, "validation must get worse for this test"
    said = f"update {best} of {last}: the lowest validation loss, {losses[best]:.4f}"
    assert f"{run.folder.model} ({said})" in capfd.readouterr().out
    assert same_weights(run.folder.model, run.folder.checkpoint(best))
    assert said in (run.folder.model / "README.md").read_text()
    eval_recipe(RECIPE, arguments, models=[])
    assert f"result: {said}" in capfd.readouterr().out
    merge(RECIPE, arguments)
    assert f"adapter: {said}" in capfd.readouterr().out
    assert said in (run.folder.merged / "README.md").read_text()

    run, _ = trained("train.result=last", "output=outputs/last")
    assert result_in_words(run.folder) == f"update {last} of {last}: train.result: last"
    assert same_weights(run.folder.model, run.folder.checkpoint(last))


def test_without_validation_rows_the_last_update_is_the_result(trained_base):
    run, _ = trained("data.validation=[]", "train.epochs=1")
    assert result_in_words(run.folder) == (
        "update 4 of 4: the last, as there is no validation"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "training", "is_warned"),
    [
        (2, [2.0, 1.0, 0.5, 0.2], True),
        (2, [2.0, 1.0, 1.5, 1.6], False),
        (4, [2.0, 1.0, 0.5, 0.2], False),
    ],
)
def test_an_early_result_while_the_training_loss_still_fell_is_worth_a_warning(
    step, training, is_warned, project, capfd
):
    run = Run.load(RECIPE)
    run.folder.folder.mkdir(parents=True)
    records = [{"step": at, "loss": loss} for at, loss in enumerate(training, start=1)]
    records += [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 1.5 if step == 2 else 0.5}]
    run.folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(run.folder.result, {"step": step, "last": 4, "why": ""})
    warn_of_early_result(run)
    said = capfd.readouterr().err
    assert (
        "the model is update 2 of 4: after it the training loss still fell" in said
    ) is is_warned


def test_a_run_that_did_not_record_it_says_nothing(project):
    assert result_in_words(Run.load(RECIPE).folder) == ""
