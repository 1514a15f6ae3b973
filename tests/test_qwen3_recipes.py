"""The recipes for Qwen3, checked by `yrun check` on a model of that form without any weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from yrunner.assembly import memory
from yrunner.commands.check.command import check
from yrunner.errors import YRunnerError
from yrunner.models.templates.choose import choose_template

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("qwen3_*.yaml"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, capitals_tokenizer: Any) -> Path:
    """A folder with a config and a tokenizer: Qwen3-0.6B but for its depth, and no weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = copy.deepcopy(capitals_tokenizer)
    choose_template(tokenizer, "qwen3")
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )
    config.save_pretrained(folder)
    return folder


def test_the_recipes_are_there():
    names = ("lora", "qlora", "full_zero3", "cpt")
    assert {f"qwen3_{name}.yaml" for name in names} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_but_the_weights_stands_in_the_way_of_a_recipe(
    name: str,
    qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # The other kinds of tuning are tested in test_check_fits.py, and take their time.
    monkeypatch.setattr(memory, "_tunings", lambda run: [run.recipe.tuning])
    options = {"as_machine": True, "gpus": 8, "memory": "80GB"}
    with pytest.raises(YRunnerError, match=r"has no model\.safetensors"):
        check(FOLDER / name, [f"model.base={qwen3}"], **options)
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"]["updates"] > 0
    [own] = [line for line in facts["memory"]["lines"] if line["is_own"]]
    assert own["fits"]
    assert facts["advice"] == []
