"""What the tests of commands share: traced updates, and a recipe that learns from pairs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions, write_jsonl
from tests.project import write_recipe


@pytest.fixture(scope="session")
def known_updates() -> dict[tuple[str, ...], Any]:
    """What `yrun check` has found of updates that have no values, by all that it depends on."""
    return {}


@pytest.fixture(autouse=True)
def each_update_is_traced_once(
    known_updates: dict[tuple[str, ...], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most tests of `yrun check` are not about memory, and it takes nearly all of their time."""
    from yrunner.training.memory.trace import trace_update

    def trace(whole: Any, build: Any, micro_batch: dict[str, Any], **options: Any) -> Any:
        rows = {name: tensor.tolist() for name, tensor in micro_batch.items()}
        key = (whole.config.to_json_string(), *map(str, (build.keywords, rows, options)))
        if key not in known_updates:
            known_updates[key] = trace_update(whole, build, micro_batch, **options)
        return known_updates[key]

    monkeypatch.setattr("yrunner.assembly.memory.trace_update", trace)


PREFERRED = {
    "name": "preferred",
    "model": {"base": "base.yaml"},
    "tuning": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0},
    "data": {"train": [{"file": "pairs.jsonl"}], "validation": [{"file": "held_out.jsonl"}]},
    "loss": {"kind": "dpo"},
    "train": {
        "stage": "preference",
        "epochs": 2,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
    },
    "drift": {"rows": 0},
}


@pytest.fixture
def preferred(trained_base):
    """A folder with a trained base, pairs, and a recipe that learns from them."""
    rows = [
        {"prompt": question, "chosen": answer, "rejected": f"I do not know {len(answer) % 7}."}
        for question, answer in questions(20)
    ]
    write_jsonl(trained_base / "pairs.jsonl", rows[:16])
    write_jsonl(trained_base / "held_out.jsonl", rows[16:])
    write_recipe(trained_base / "preferred.yaml", PREFERRED)
    return trained_base


REWARDED = {
    "name": "rewarded",
    "model": {"base": "base.yaml"},
    "tuning": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0},
    "data": {
        "max_length": 128,
        "train": [{"file": "prompts.jsonl"}],
        "validation": [{"file": "asked.jsonl"}],
    },
    "rewards": [{"kind": "pattern", "pattern": "is"}, {"kind": "repetition", "weight": 0.1}],
    # This base has never learned to end an answer.
    "rollout": {"generations": 4, "max_new_tokens": 8, "truncated": "keep"},
    "loss": {"kind": "grpo"},
    "train": {
        "stage": "rl",
        "epochs": 2,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "log_every": 1,
    },
    "drift": {"rows": 0},
}

BRIEF = "eval.tasks=[{name: few, kind: answer, side: domain, data: test.jsonl, max_new_tokens: 4}]"
"""Answers before and after that end soon: ZeRO 3 gathers all weights for each token of them."""


@pytest.fixture
def rewarded(trained_base):
    """A folder with a trained base, prompts, and a recipe that learns from rewards."""
    rows = [{"prompt": question, "answer": answer} for question, answer in questions(20)]
    write_jsonl(trained_base / "prompts.jsonl", rows[:16])
    write_jsonl(trained_base / "asked.jsonl", rows[16:])
    write_recipe(trained_base / "rewarded.yaml", REWARDED)
    return trained_base


def records(name="preferred"):
    """The records of a run's metrics."""
    lines = Path(f"outputs/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
