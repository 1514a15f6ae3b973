"""An adapter trained through a quantized base: it learns, goes on, and is merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.project import SCRATCH
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.errors import MissingError, RecipeError
from yrunner.recipe.load import load_recipe
from yrunner.storage.run_dir import RunDir

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
"""Weights are quantized in blocks of 64."""


@pytest.fixture
def tuned(project: Path, change: Any) -> RunDir:
    """The run folder of tuned.yaml, whose base is wide enough to be quantized."""
    scratch = {**SCRATCH, "config": {**SCRATCH["config"], **WIDE}}
    change("base.yaml", model__scratch=scratch, train__epochs=1)
    change(
        "tuned.yaml",
        tuning={"kind": "qlora", "rank": 4, "alpha": 8},
        train__epochs=4,
        train__log_every=1,
        train__checkpoint={"every": 4, "keep": 9},
        eval__tasks=[],
    )
    return RunDir(project / "outputs/tuned")


def run(*overrides: str, resume: bool = False) -> None:
    train(Path("tuned.yaml"), list(overrides), resume=resume, overwrite=not resume)


def losses(run_dir: RunDir) -> list[float]:
    records = map(json.loads, run_dir.metrics.read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def adapter(run_dir: RunDir) -> torch.Tensor:
    weights = load_file(run_dir.model / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_it_learns_goes_on_from_a_checkpoint_and_is_merged(tuned: RunDir):
    run("train.optimizer=paged_adamw_8bit")
    assert losses(tuned)[-1] < losses(tuned)[0] - 0.1
    undisturbed = adapter(tuned)
    # As after a stop behind update 8.
    shutil.rmtree(tuned.model)
    for step in [step for step in tuned.saved_steps() if step > 8]:
        shutil.rmtree(tuned.checkpoint(step))
    run("train.optimizer=paged_adamw_8bit", resume=True)
    assert torch.equal(adapter(tuned), undisturbed)
    as_trained = "merge.as_trained={quant_type: nf4, double_quant: true}"
    for overrides in ([], [as_trained]):
        merge(Path("tuned.yaml"), ["train.optimizer=paged_adamw_8bit", *overrides])
        assert (tuned.merged / "model.safetensors").exists()
        shutil.rmtree(tuned.merged)


@pytest.mark.parametrize(
    ("quant_type", "optimizer"), [("fp4", "adamw_8bit"), ("int8", "paged_adamw_32bit")]
)
def test_every_kind_of_weight_and_optimizer_learns(tuned: RunDir, quant_type, optimizer):
    run(f"tuning.quant_type={quant_type}", f"train.optimizer={optimizer}")
    assert losses(tuned)[-1] < losses(tuned)[0] - 0.1


def test_without_bitsandbytes_a_sentence_says_how_to_add_it(tuned: RunDir, monkeypatch):
    monkeypatch.setattr("yrunner.models.quantization.find_spec", lambda name: None)
    for overrides in (["tuning.kind=qlora"], ["tuning={kind: lora}", "train.optimizer=adamw_8bit"]):
        with pytest.raises(MissingError, match=r"bitsandbytes.*pip install 'yrunner\[qlora\]'"):
            run(*overrides)
    assert not tuned.folder.exists()


def test_a_merge_as_another_kind_than_it_was_trained_is_refused(project: Path, tuned: RunDir):
    with pytest.raises(RecipeError, match=r"as_trained has fp4.*but tuning has nf4"):
        load_recipe(Path("tuned.yaml"), ["merge.as_trained={quant_type: fp4}"])
