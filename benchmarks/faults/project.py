"""The tiny project of the campaign: a base of a few thousand weights and LoRA runs on it."""

import json
from pathlib import Path
from typing import Any

import yaml

CAPITALS = {"Aru": "Belo", "Coria": "Dane", "Elmo": "Fane", "Goria": "Hulm", "Isk": "Jorn"}
NUM_WIDE_ROWS = 1_500
REPLAY_WRITER_EPOCHS = 40
"""Enough for the base to end its sentences, so that it can write replay rows."""

SCRATCH = {
    "config": {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "vocab_size": 320,
}


def write_project(folder: Path) -> None:
    """Write the recipes and their data.

    base, tuned, saving (a checkpoint at every update), wide (many rows), writer (a base that writes
    replay rows), replaying, compared.
    """
    folder.mkdir(parents=True)
    _write_rows(folder / "base.jsonl", range(32))
    _write_rows(folder / "train.jsonl", range(32))
    _write_rows(folder / "validation.jsonl", range(32, 36))
    _write_rows(folder / "test.jsonl", range(36, 40))
    _write_rows(folder / "wide.jsonl", range(NUM_WIDE_ROWS))
    base: dict[str, Any] = {
        "name": "base",
        "model": {"scratch": SCRATCH},
        "tuning": {"kind": "full"},
        "data": {"train": [{"file": "base.jsonl"}]},
        "train": {"stage": "pretrain", "epochs": 2, "batch_size": 8, "learning_rate": 1e-2},
    }
    tuned: dict[str, Any] = {
        "name": "tuned",
        "model": {"base": "base.yaml"},
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"file": "train.jsonl"}],
            "validation": [{"file": "validation.jsonl"}],
        },
        "loss": {"kind": "nlirg"},
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 2,
            "checkpoint": {"every": 3},
        },
        "eval": {
            "tasks": [
                {
                    "name": "capitals",
                    "kind": "answer",
                    "side": "domain",
                    "data": "test.jsonl",
                    "max_new_tokens": 8,
                }
            ]
        },
    }
    often = {"checkpoint": {"every": 1}}
    recipes = [
        base,
        tuned,
        tuned | {"name": "saving", "train": tuned["train"] | often},
        tuned | {"name": "wide", "data": {"train": [{"file": "wide.jsonl"}]}},
        base | {"name": "writer", "train": base["train"] | {"epochs": REPLAY_WRITER_EPOCHS}},
        tuned
        | {
            "name": "replaying",
            "model": {"base": "writer.yaml"},
            "keep": {"kind": "self_replay", "rows": 8, "max_new_tokens": 32},
            "drift": {"rows": 2},
        },
        _compared(tuned),
    ]
    for recipe in recipes:
        text = yaml.safe_dump(recipe, sort_keys=False)
        (folder / f"{recipe['name']}.yaml").write_text(text, "utf-8")


def _compared(tuned: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment of two arms, with a domain and a general task."""
    (task,) = tuned["eval"]["tasks"]
    other = {"name": "others", "side": "general", "data": "validation.jsonl"}
    return tuned | {
        "name": "compared",
        "train": tuned["train"] | {"epochs": 1},
        "drift": {"rows": 0},
        "eval": {"tasks": [task, task | other]},
        "compare": {"arms": {"nlirg": {}, "plain": {"loss": {"kind": "plain"}}}, "seeds": [0]},
    }


def row(number: int) -> dict[str, str]:
    """Return a question with an answer; answers have uneven lengths."""
    country, capital = list(CAPITALS.items())[number % len(CAPITALS)]
    answer = f"{capital} is the capital. " * (1 + number * 7 % 5)
    return {"instruction": f"Capital of {country}, question {number}?", "output": answer.strip()}


def _write_rows(path: Path, numbers: range) -> None:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in numbers), "utf-8")
