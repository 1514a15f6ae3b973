"""Models in folders and in the Hub's cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from yrunner.errors import ModelError
from yrunner.models.errors import INDEX_FILE
from yrunner.models.local import count_weights, local_folder, weight_files


def write_model(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    for name in files:
        save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / name)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
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


def test_a_model_on_the_hub_is_found_if_all_its_weights_are_cached(cache: Path) -> None:
    assert local_folder("someone/model") is None
    folder = write_cached(cache)
    assert local_folder("someone/model") is None, "a config alone is not a model"
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    assert local_folder("someone/model") == folder
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index), "utf-8")
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
