"""A tiny tokenizer, model and data set that every test can have without a download."""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.project", "tests.yrun_process"]

# Nothing may reach for the network; it would only wait for a time-out here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not torch.cuda.is_available():
    # Triton asks for it when it is imported: without a GPU, kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# Tests run in two processes, and models this small gain nothing from a second thread; what they
# start inherits it, for threads that wait for each other on a full machine wait very long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# No test fails because a machine is slow, or has much else to do.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slow")

LONGEST_FIRST = (
    "test_main_job.py",
    "training/test_ranks.py",
    "commands/test_train_ppo.py",
    "faults/test_campaign.py",
    "commands/compare/test_command.py",
    "commands/sort/test_command.py",
    "commands/merge/test_command.py",
    "losses/test_parallel_zero.py",
    "training/preference/test_objective.py",
    "training/test_trainer.py",
    "commands/test_train_rl.py",
    "commands/test_train_ranks.py",
    "training/memory/test_memory.py",
    "commands/test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, or one process would wait for the other at the end."""
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST_FIRST)}
    assert all(path.exists() for path in place), "a file of LONGEST_FIRST has moved"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Garbage is looked for in what tests make, not each time in all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is never freed is a leak to the libraries that count, when Python ends."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def plots_keep_their_margins(request: pytest.FixtureRequest) -> Iterator[None]:
    """To fit the margins of its plots takes a fifth of a small training; tests/reports does it."""
    from yrunner.reports import svg

    with pytest.MonkeyPatch.context() as patch:
        if "reports" not in request.path.parts:
            patch.setattr(svg, "LAYOUT", None)
        yield


CAPITALS = {"Aru": "Belo", "Coria": "Dane", "Elmo": "Fane", "Goria": "Hulm", "Isk": "Jorn"}


def questions(number: int) -> list[tuple[str, str]]:
    """Questions with answers of very uneven lengths."""
    rows = []
    for index in range(number):
        land, capital = list(CAPITALS.items())[index % len(CAPITALS)]
        answer = f"{capital} is the capital. " * (1 + index * 7 % 5)
        rows.append((f"Capital of {land}, question {index}?", answer.strip()))
    return rows


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def capitals_tokenizer() -> Any:
    from yrunner.models.scratch import train_tokenizer

    texts = [text for row in questions(40) for text in row]
    return train_tokenizer(texts, vocab_size=320)


@pytest.fixture
def make_model(capitals_tokenizer: Any) -> Callable[..., Any]:
    """Build a model of two layers; the same seed gives the same weights."""
    from yrunner.models.scratch import build_model

    def make(seed: int = 0, model_type: str = "qwen3") -> Any:
        config = {
            "model_type": model_type,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }
        if model_type == "qwen3":
            config["head_dim"] = 8
        return build_model(config, capitals_tokenizer, seed)

    return make


@pytest.fixture
def make_talker(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """The same with a head of its own: left tied, it would only repeat the prompt's last token."""

    def make(seed: int = 0, model_type: str = "qwen3") -> Any:
        model = make_model(seed, model_type)
        chance = torch.Generator().manual_seed(seed)
        weight_VH = torch.randn(model.lm_head.weight.shape, generator=chance)
        model.lm_head.weight = torch.nn.Parameter(weight_VH)
        return model

    return make


@pytest.fixture(scope="session")
def examples(capitals_tokenizer: Any) -> list[Any]:
    """Forty tokenized conversations."""
    from yrunner.data.chat.tokenize import tokenize_conversations
    from yrunner.data.conversation import Conversation, Message
    from yrunner.errors import Origin

    talks = [
        Conversation(
            (Message("user", question), Message("assistant", answer)), Origin(Path("q"), n)
        )
        for n, (question, answer) in enumerate(questions(40), start=1)
    ]
    return list(tokenize_conversations(talks, capitals_tokenizer))
