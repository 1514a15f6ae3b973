"""The key of a model stays when nothing but its place changes, and changes with all else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from yrunner.errors import ModelError
from yrunner.models.model_key import NUM_PIECES, PIECE_BYTES, model_key

LONGEST_HEADER = 100
"""Bytes: what follows are weights."""


def write_model(folder: Path, config: str = "config.json", weights: str = "model") -> Path:
    """A folder with a config and weights of four mebibytes."""
    folder.mkdir(parents=True)
    content = {"hidden_size": 8, "_name_or_path": str(folder)}
    (folder / config).write_text(json.dumps(content), "utf-8")
    save_file({"a": torch.arange(2.0**20)}, folder / f"{weights}.safetensors")
    return folder


def change_weights(file: Path, start: int, end: int) -> None:
    """Other bytes from `start` to before `end`."""
    content = bytearray(file.read_bytes())
    content[start:end] = bytes(byte ^ 1 for byte in content[start:end])
    file.write_bytes(content)


def test_a_copy_elsewhere_has_the_same_key(tmp_path):
    assert model_key(write_model(tmp_path / "a")) == model_key(str(write_model(tmp_path / "b")))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_other_weights_of_the_same_size_have_another_key(tmp_path, share):
    folder = write_model(tmp_path / "a")
    before = model_key(folder)
    file = folder / "model.safetensors"
    start = int(share * file.stat().st_size) + LONGEST_HEADER
    change_weights(file, start, start + file.stat().st_size // NUM_PIECES + PIECE_BYTES)
    assert model_key(folder) != before


def test_every_byte_of_small_weights_counts(tmp_path):
    folder = write_model(tmp_path / "a")
    file = folder / "model.safetensors"
    save_file({"a": torch.zeros(5000)}, file)
    before = model_key(folder)
    change_weights(file, 12345, 12346)
    assert model_key(folder) != before


def test_config_code_and_files_of_weights_count(tmp_path):
    folder = write_model(tmp_path / "a")
    keys = [model_key(folder)]
    (folder / "config.json").write_text('{"hidden_size": 16}', "utf-8")
    keys.append(model_key(folder))
    (folder / "modeling_own.py").write_text("", "utf-8")
    keys.append(model_key(folder))
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    keys.append(model_key(folder))
    (folder / "training_log.json").write_text("[]", "utf-8")
    assert model_key(folder) == keys[-1]
    assert len(set(keys)) == 4


def test_an_adapter_counts_with_its_base_wherever_that_stands(tmp_path):
    base, moved = write_model(tmp_path / "base"), write_model(tmp_path / "moved")
    adapter = write_model(tmp_path / "adapter", "adapter_config.json", "adapter_model")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"r": 8, "base_model_name_or_path": str(base)}), "utf-8")
    before = model_key(adapter)
    assert before != model_key(base)
    config.write_text(json.dumps({"r": 8, "base_model_name_or_path": str(moved)}), "utf-8")
    assert model_key(adapter) == before
    change_weights(moved / "model.safetensors", LONGEST_HEADER, 2 * LONGEST_HEADER)
    assert model_key(adapter) != before


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    keys = []
    for commit in ("1234", "5678"):
        write_model(repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit, "utf-8")
        keys.append(model_key("someone/model"))
    assert keys[0] != keys[1]


def test_no_model_has_no_key(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="holds no model"):
        model_key(tmp_path)
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        model_key("someone/model")
