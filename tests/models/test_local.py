"""Models in folders and in the Hub's cache; the memory free for them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from yrunner.errors import ModelError
from yrunner.models import local
from yrunner.models.local import (
    INDEX_FILE,
    CgroupMemory,
    cgroup_memory,
    count_weights,
    free_memory,
    local_folder,
    weight_files,
)


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


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(local, "CGROUP", tmp_path)
    return tmp_path


def write_version_2(folder: Path, limit: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("900\n")
    (folder / "memory.stat").write_text("anon 300\ninactive_file 600\n")


def write_version_1(folder: Path, limit: str) -> None:
    (folder / "memory").mkdir()
    (folder / "memory/memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory/memory.usage_in_bytes").write_text("900\n")
    (folder / "memory/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 600\n")


@pytest.mark.parametrize("write", [write_version_1, write_version_2])
def test_cached_pages_of_files_count_as_free(groups: Path, write) -> None:
    write(groups, "1000")
    assert cgroup_memory() == CgroupMemory(limit=1000, used=300)
    assert cgroup_memory().free == 700


def test_without_a_cgroup_or_a_limit_there_is_none(groups: Path) -> None:
    assert cgroup_memory() is None
    write_version_2(groups, "max")
    assert cgroup_memory() is None
    write_version_1(groups, str(2**63 - 4096))
    assert cgroup_memory() is None


def test_free_memory_is_within_the_limit_of_a_container(groups: Path) -> None:
    assert free_memory() > 1000
    write_version_2(groups, "max")
    assert free_memory() > 1000
    write_version_2(groups, "1000")
    assert free_memory() == 700


PROGRAM = """
import os, sys
from yrunner.models.local import lower_mmap_threshold

if sys.argv[1] == "returns":
    lower_mmap_threshold()
bytearray(30 * 2**20)  # after this glibc retains blocks of this size
blocks = [(bytearray(2**21), bytearray(2**18)) for _ in range(50)]
small = [block for _, block in blocks]; del blocks
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE"))
"""


def resident_bytes(way: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc retains freed blocks")
def test_freed_blocks_between_others_return_to_the_system():
    retained, returned = resident_bytes("retains"), resident_bytes("returns")
    assert retained - returned > 80e6
