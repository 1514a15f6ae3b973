"""Whole modules and faster second matrices beside LoRA: trained, resumed, measured, merged."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.errors import ModelError, RecipeError
from yrunner.recipe.load import load_recipe
from yrunner.storage.run_dir import RunDir

TUNING = {"kind": "lora", "rank": 4, "alpha": 8, "lora_plus_ratio": 8.0}


@pytest.mark.parametrize("saved", [["embed_tokens"], ["norm"]])
def test_they_learn_go_on_from_a_checkpoint_are_measured_and_merged(trained_base, change, saved):
    change(
        "tuned.yaml",
        tuning={**TUNING, "modules_to_save": saved},
        train__checkpoint={"every": 4, "keep": 9},
        train__validate_every=1,
        drift__rows=2,
    )
    path, run_dir = Path("tuned.yaml"), RunDir(Path("outputs/tuned"))
    train(path, [], resume=False, overwrite=True)
    undisturbed = (run_dir.model / "adapter_model.safetensors").read_bytes()
    kept = [name for name in load_file(run_dir.model / "adapter_model.safetensors")]
    assert any(saved[0] in name for name in kept)
    rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == list(range(1, 9))
    assert all(row["eval_drift"] >= 0 for row in rows if "eval_loss" in row)
    shutil.rmtree(run_dir.model)
    for step in [step for step in run_dir.saved_steps() if step > 4]:
        shutil.rmtree(run_dir.checkpoint(step))
    train(path, [], resume=True, overwrite=False)
    assert (run_dir.model / "adapter_model.safetensors").read_bytes() == undisturbed
    eval_recipe(path, [], [])
    merge(path, [])
    assert (run_dir.merged / "model.safetensors").exists()


def test_a_module_that_the_model_has_not_is_refused_with_the_nearest(trained_base, change):
    change("tuned.yaml", tuning={**TUNING, "modules_to_save": ["embed_token"]})
    with pytest.raises(ModelError, match=r'called "embed_token".*Did you mean "embed_tokens"'):
        train(Path("tuned.yaml"), [], resume=False, overwrite=True)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tuning.train_tokens=[a]", "train_tokens and modules_to_save cannot be combined"),
        ("distributed.deepspeed={stage: 2}", "modules_to_save and distributed.deepspeed"),
        ("data.validation=[]", "train.validate_every needs validation rows"),
    ],
)
def test_what_does_not_go_together_is_refused(project, change, override, sentence):
    tuning = {**TUNING, "modules_to_save": ["embed_tokens"]}
    change("tuned.yaml", tuning=tuning, train__validate_every=2)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(Path("tuned.yaml"), [override])
    change("tuned.yaml", tuning=TUNING, train__validate_every=2)
    with pytest.raises(RecipeError, match=r"lora_plus_ratio and distributed\.deepspeed"):
        load_recipe(Path("tuned.yaml"), ["distributed.deepspeed={stage: 1}"])
