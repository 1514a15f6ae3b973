"""A run that stops by itself says why, names rows and keys, and loses nothing."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import write_jsonl
from yrunner.assembly import trainer
from yrunner.assembly.preflight import DiskFacts, lack_of_space
from yrunner.assembly.run import Run
from yrunner.commands.check.command import check
from yrunner.commands.train import train
from yrunner.errors import DataError, RunError, YRunnerError
from yrunner.models.size import state_bytes
from yrunner.storage.run_dir import RunDir
from yrunner.training.memory.trace import optimizer_bytes, weightless_optimizer


def run(recipe, *overrides):
    train(Path(recipe), list(overrides), resume=False, overwrite=True)


@pytest.fixture
def spoil(monkeypatch):
    """Let every model that is trained answer to a fault, given its batch of tokens."""

    def spoil_with(fault):
        build = trainer.untrained_model

        def built(*args):
            model = build(*args)
            model.model.layers[0].register_forward_hook(
                lambda module, inputs, output: fault(model, inputs[0], output)
            )
            return model

        monkeypatch.setattr("yrunner.commands.train.untrained_model", built)

    return spoil_with


def test_a_loss_that_is_no_number_names_the_row_and_keeps_the_state(project, spoil):
    """One row overflows, and always the same: that with the most tokens of all."""
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    rows[10] |= {"output": " ".join(map(str, range(60)))}
    write_jsonl(project / "train.jsonl", rows)

    def fault(model, hidden_BTD, output):
        return output * math.nan if model.training and hidden_BTD.shape[1] > 100 else output

    spoil(fault)
    with pytest.raises(RunError) as caught:
        run("base.yaml", "train.batch_size=2", "train.order=as_written", "train.spikes.window=10")
    message = str(caught.value)
    assert re.search(
        r"^update 6: the loss is nan; the optimizer step was not taken; update 5 is", message
    )
    assert "rows that cause it alone: train.jsonl:11. Likely causes: the data of these" in message
    assert "yrun inspect RECIPE --row train.jsonl:11" in message
    run_dir = RunDir(project / "outputs/base")
    assert run_dir.saved_steps() == [5]
    kept = json.loads(run_dir.explosion.read_text())
    assert kept["update"] == 6
    assert [row["row"] for row in kept["rows"] if not row["is_finite"]] == [11]


def test_broken_weights_are_told_from_a_learning_rate_that_is_too_high(project, spoil):
    def break_a_weight(model, hidden_BTD, output):
        if model.training:
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan

    spoil(break_a_weight)
    with pytest.raises(RunError, match=r"the weights are already broken: \S+up_proj\.weight has"):
        run("base.yaml")
    assert RunDir(project / "outputs/base").saved_steps() == []


def test_a_lack_of_memory_names_the_keys_that_help_most_and_what_they_save(project, spoil):
    def be_short(model, hidden_BTD, output):
        if model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    spoil(be_short)
    with pytest.raises(RunError) as caught:
        run("base.yaml")
    message = str(caught.value)
    assert re.search(r"before the first update: the largest micro-batch has 8 examples of", message)
    saved = re.findall(r"(\S+=\S+|\S+=\S+ with \S+) saves about ([\d.]+) MB", message)
    assert len(saved) == 3
    amounts = [float(amount) for _, amount in saved]
    assert amounts == sorted(amounts, reverse=True) and amounts[-1] > 0
    assert "train.batch_size=4 with train.gradient_accumulation_steps=2" in message


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
def test_the_optimizer_takes_as_many_bytes_as_was_told(name):
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (5,))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = weightless_optimizer(name, weights, foreach=False)
    optimizer.step()
    assert optimizer_bytes(name, weights) == state_bytes(optimizer)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(project, monkeypatch):
    monkeypatch.setattr("yrunner.assembly.preflight.free_bytes", lambda _: 100_000)
    said = r"has 0\.1 MB free, but the run needs \d\.\d MB: up to 2 checkpoints of .*the model of"
    for command in (
        lambda: run("base.yaml"),
        lambda: check(Path("base.yaml"), [], as_machine=False, sample=0),
    ):
        with pytest.raises(RunError, match=said):
            command()
    assert not RunDir(project / "outputs/base").is_used()
    run_of_recipe = Run.load(Path("base.yaml"))
    assert lack_of_space(run_of_recipe, DiskFacts(1, 2, 1, needed=4, free=4)) is None


@pytest.mark.parametrize("learned", [1, 3])
def test_one_row_or_a_batch_larger_than_the_data_trains(project, learned):
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    write_jsonl(project / "train.jsonl", rows[:learned])
    run("base.yaml", "train.epochs=1")
    assert RunDir(project / "outputs/base").is_finished()


def test_one_target_trains_and_an_empty_file_is_refused(project):
    write_jsonl(project / "train.jsonl", [{"text": "ab"}])
    run("base.yaml", "data.max_length=2", "data.too_long=cut", "train.epochs=1")
    assert RunDir(project / "outputs/base").is_finished()
    (project / "train.jsonl").write_text("")
    with pytest.raises(YRunnerError, match=r"train\.jsonl") as caught:
        run("base.yaml")
    assert "Traceback" not in str(caught.value)


def test_a_row_longer_than_the_models_positions_is_refused_before_the_model_is_built(project):
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    rows[4] |= {"output": "a word, " * 200}
    write_jsonl(project / "train.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"train\.jsonl row 5: [\d,]+ tokens, and the model has 256 positions\. Set data",
    ):
        run("base.yaml")
    run("base.yaml", "data.max_length=256", "data.too_long=cut", "train.epochs=1")
