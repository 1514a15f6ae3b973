"""Two micro recipes, a base from scratch and a LoRA on it, that train in seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import questions, write_jsonl
from yrunner.evaluation.results import TaskResult, mean_figures
from yrunner.recipe.schema.eval import Side

SCRATCH = {
    "config": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "vocab_size": 320,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and two recipes, base.yaml and tuned.yaml; commands run in it."""
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path)


def write_project(folder: Path) -> Path:
    """Write the data and the two recipes into a folder."""
    rows = [{"instruction": question, "output": answer} for question, answer in questions(24)]
    write_jsonl(folder / "train.jsonl", rows[:16])
    write_jsonl(folder / "validation.jsonl", rows[16:20])
    write_jsonl(folder / "test.jsonl", rows[20:])
    base = {
        "name": "base",
        "model": {"scratch": SCRATCH},
        "tuning": {"kind": "full"},
        "data": {"train": [{"file": "train.jsonl"}]},
        "train": {"stage": "pretrain", "epochs": 2, "batch_size": 8, "learning_rate": 1e-2},
    }
    tuned = {
        "name": "tuned",
        "model": {"base": "base.yaml"},
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"file": "train.jsonl"}],
            "validation": [{"file": "validation.jsonl"}],
        },
        "loss": {"kind": "nlirg"},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2},
        "drift": {"rows": 0},  # this base has never learned to end a sentence
        "eval": {
            "budget": None,
            "tasks": [
                {
                    "name": "capitals",
                    "kind": "answer",
                    "side": "domain",
                    "data": "test.jsonl",
                    "max_new_tokens": 8,
                }
            ],
        },
    }
    write_recipe(folder / "base.yaml", base)
    write_recipe(folder / "tuned.yaml", tuned)
    return folder


DPO = Path("dpo.yaml")


def pairs(number: int) -> list[dict[str, str]]:
    return [
        {"prompt": question, "chosen": answer, "rejected": answer.replace("capital", "town")}
        for question, answer in questions(number)
    ]


@pytest.fixture
def preference(project: Path) -> Path:
    """A project with a third recipe, dpo.yaml, on pairs."""
    write_jsonl(project / "pairs.jsonl", pairs(16))
    write_jsonl(project / "held_out.jsonl", pairs(20)[16:])
    recipe = yaml.safe_load((project / "tuned.yaml").read_text("utf-8"))
    recipe |= {"name": "dpo", "loss": {"kind": "dpo"}, "eval": {}}
    recipe["train"]["stage"] = "preference"
    recipe["data"] = {
        "max_length": 128,
        "train": [{"file": "pairs.jsonl"}],
        "validation": [{"file": "held_out.jsonl"}],
    }
    write_recipe(project / DPO, recipe)
    return project


def answers_of(side: Side, exact: list[float]) -> TaskResult:
    """What a model reached in a task of kind answer, of which each answer was exact or not."""
    per_question = {"exact": exact}
    return TaskResult(side, "answer", "exact", mean_figures(per_question), per_question)


@pytest.fixture(scope="session")
def kept_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the result of base.yaml is kept, which is the same for every test."""
    return tmp_path_factory.mktemp("kept") / "base"


@pytest.fixture
def trained_base(project: Path, kept_base: Path) -> Path:
    """The folder of the recipes, where base.yaml has a result and tuned.yaml has none."""
    from yrunner.commands.train import train

    result = project / "outputs/base"
    if kept_base.exists():
        shutil.copytree(kept_base, result)
    else:
        train(Path("base.yaml"), [], resume=False, overwrite=False)
        shutil.copytree(result, kept_base)
    return project


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


@pytest.fixture
def change(project: Path) -> Callable[..., None]:
    """Change keys of a recipe by their dotted names."""

    def change_keys(recipe: str, **keys: Any) -> None:
        path = project / recipe
        content = yaml.safe_load(path.read_text("utf-8"))
        for dotted, value in keys.items():
            section = content
            *parents, last = dotted.split("__")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        write_recipe(path, content)

    return change_keys
