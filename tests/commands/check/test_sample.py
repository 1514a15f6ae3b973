"""Which rows the base scores before training; where it cannot, one sentence says why."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.commands.check.test_command import facts_of
from yrunner.assembly.run import Run
from yrunner.commands.check import signal as check_sample
from yrunner.commands.check.command import check
from yrunner.commands.check.facts import check_model
from yrunner.commands.check.signal import NotScored, find_base, score_sample, spread
from yrunner.commands.train import train
from yrunner.errors import ModelError

TUNED = Path("tuned.yaml")


def training_examples(recipe_path: Path) -> Any:
    return Run.load(recipe_path).dataset.train


@pytest.mark.parametrize("number", [1, 3, 5, 16, 99])
def test_the_sample_is_spread_over_all_rows_and_always_the_same(project: Path, number: int) -> None:
    examples = training_examples(Path("base.yaml"))
    rows = [example.origin.row for example in spread(examples, number)]
    assert len(rows) == len(set(rows)) == min(number, 16)
    steps = {after - before for before, after in pairwise(rows)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
    assert rows[0] - 1 == pytest.approx(16 - rows[-1], abs=1)


def test_as_many_rows_are_scored_as_are_asked_for_or_as_can_be_afforded(
    trained_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(sample: int | None = None) -> Any:
        capsys.readouterr()
        check(TUNED, [], as_machine=True, sample=sample)
        return json.loads(capsys.readouterr().out)["signal"].get("rows")

    assert rows(5) == 5
    monkeypatch.setattr(check_sample, "MOST_TARGETS", 100)
    assert 1 <= rows() < 16
    monkeypatch.setattr(check_sample, "MOST_TARGETS", 1)
    assert rows() == 1
    monkeypatch.setattr(check_sample, "MOST_TARGETS", 10**6)
    monkeypatch.setattr(check_sample, "USUAL_WORK", {"cpu": 1.0, "cuda": 1.0})
    assert rows() == check_sample.LEAST_ROWS
    monkeypatch.setattr(check_sample, "MOST_WORK", {"cpu": 1.0, "cuda": 1.0})
    assert rows() is None
    assert rows(2) == 2


def skipped(capsys: pytest.CaptureFixture[str], recipe: str, *overrides: str) -> str:
    return str(facts_of(capsys, recipe, *overrides)["signal"]["skipped"])


def test_without_a_base_that_is_finished_it_says_which_command_makes_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a model from scratch knows nothing yet" in skipped(capsys, "base.yaml")
    assert skipped(capsys, "tuned.yaml").endswith("train it with: yrun train base.yaml")
    check(TUNED, [], as_machine=False, as_page=True)
    out = capsys.readouterr().out
    assert "losses of the base: the base base is not trained" in out
    assert "page: nothing to draw" in out


def test_a_base_that_does_not_fit_into_the_memory_is_not_loaded(
    trained_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_sample, "free_memory", lambda: 1000)
    assert "GB of memory, but only 0.0 GB are free" in skipped(capsys, "tuned.yaml")


def test_a_sample_of_zero_and_data_without_targets_are_not_scored(
    trained_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(TUNED, [], as_machine=True, sample=0)
    assert "--sample 0" in json.loads(capsys.readouterr().out)["signal"]["skipped"]
    run = Run.load(TUNED)
    found = score_sample(run, run.dataset.train[:0], None)
    assert found == NotScored("the data has no targets")


@pytest.fixture
def hub_base(
    trained_base: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The base as `someone/base` in the Hub's cache, its weights not there; its folder."""
    cache = trained_base / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--base"
    folder = repository / "snapshots" / "1234"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(trained_base / "outputs" / "base" / "model", folder, ignore=weights)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1234", "utf-8")
    change("tuned.yaml", model__base="someone/base")
    return folder


def test_a_base_of_the_hub_is_scored_from_the_cache_and_never_downloaded(
    hub_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = skipped(capsys, "tuned.yaml")
    assert "check does not download them; get them with: hf download someone/base" in said
    adapter = Path("adapter")
    adapter.mkdir()
    text = json.dumps({"base_model_name_or_path": "someone/base"})
    (adapter / "adapter_config.json").write_text(text, "utf-8")
    (adapter / "adapter_model.safetensors").touch()
    found = find_base(Run.load(TUNED, [f"model.base={adapter.absolute()}"]))
    assert isinstance(found, NotScored)
    assert found.skipped.startswith("the weights of someone/base are not on this machine")
    shutil.copy("outputs/base/model/model.safetensors", hub_base)
    assert facts_of(capsys, "tuned.yaml")["signal"]["rows"] == 16


def test_a_run_that_goes_on_from_an_adapter_starts_with_its_losses(
    trained_base: Path, change: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = facts_of(capsys, "tuned.yaml")["signal"]
    train(TUNED, [], resume=False, overwrite=False)
    adapter = trained_base / "outputs" / "tuned" / "model"
    change("tuned.yaml", tuning={"kind": "lora", "adapter": str(adapter)})
    after = facts_of(capsys, "tuned.yaml")["signal"]
    assert after["targets"] == before["targets"]
    assert after["mean_weight"] != before["mean_weight"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_base_that_was_tried_is_scored_and_not_loaded_again(
    goes_on: bool,
    trained_base: Path,
    change: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if goes_on:
        train(TUNED, [], resume=False, overwrite=False)
        adapter = trained_base / "outputs" / "tuned" / "model"
        change("tuned.yaml", tuning={"kind": "lora", "adapter": str(adapter)})
    run = Run.load(TUNED)
    alone = score_sample(run, run.dataset.train, None)
    assert not isinstance(alone, NotScored)
    monkeypatch.setattr(check_sample, "load_base", lambda *_: pytest.fail("loaded again"))
    signal = facts_of(capsys, "tuned.yaml")["signal"]
    assert signal["mean_loss"] == pytest.approx(float(alone.loss_N.mean()), rel=1e-6)


def test_products_in_bfloat16_are_chosen_for_the_sample_as_for_a_sort(
    trained_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(*, halves: bool) -> Any:
        run = Run.load(TUNED)
        run.__dict__["halves_products"] = halves
        sample = score_sample(run, run.dataset.train, None, check_model(run).base)
        assert not isinstance(sample, NotScored)
        return sample.loss_N

    float32, half = losses(halves=False), losses(halves=True)
    assert not torch.equal(half, float32)
    torch.testing.assert_close(half, float32, rtol=0.02, atol=0.02)


def test_a_base_that_is_damaged_is_refused_as_training_would(
    trained_base: Path, change: Callable[..., None]
) -> None:
    model = trained_base / "outputs" / "base" / "model"
    change("tuned.yaml", model__base=str(model))
    (model / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(
        ModelError, match=r"model.safetensors is cut or damaged: its 20 bytes have no"
    ):
        check(TUNED, [], as_machine=False)
