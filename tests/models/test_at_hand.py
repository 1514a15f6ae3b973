"""What is here is found without a download, also in the Hub's cache, and what fits is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from yrunner.errors import ModelError
from yrunner.models import local as at_hand
from yrunner.models import local as container
from yrunner.models.local import count_weights, free_memory, local_folder, weight_files


def write_model(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    for name in files:
        save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / name)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_cached(cache: Path, *files: str) -> Path:
    """The folder of `someone/model` in the cache."""
    repository = cache / "models--someone--model"
    folder = write_model(repository / "snapshots" / "1234", *files)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1234", "utf-8")
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path


def test_a_model_of_the_hub_is_found_where_all_its_weights_are_in_the_cache(cache: Path) -> None:
    assert local_folder("someone/model") is None
    folder = write_cached(cache)
    assert local_folder("someone/model") is None, "a config alone is no model"
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    assert local_folder("someone/model") == folder
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / at_hand.INDEX_FILE).write_text(json.dumps(index), "utf-8")
    assert local_folder("someone/model") is None, "one of two files is still missing"


def test_weights_are_counted_from_the_headers_of_all_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "model-1.safetensors", "model-2.safetensors")
    assert count_weights(weight_files(folder)) == 2 * (12 + 5)


def test_the_weights_of_an_adapter_are_its_own_and_those_of_its_base(
    tmp_path: Path, cache: Path
) -> None:
    base = write_model(tmp_path / "base", "model.safetensors")
    adapter = write_model(tmp_path / "adapter", "adapter_model.safetensors")
    config: dict[str, Any] = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert count_weights(weight_files(adapter)) == 2 * (12 + 5)
    config = {"base_model_name_or_path": "someone/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert weight_files(adapter) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors has a damaged safetensors file"):
        count_weights(weight_files(folder))


def test_the_limit_of_a_container_counts_as_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "CGROUP", tmp_path)
    unlimited = free_memory()
    assert unlimited > 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 600\n")
    assert free_memory() == 700
