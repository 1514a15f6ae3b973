"""The limit of a container is read in the words of both versions of control groups."""

from pathlib import Path

import pytest

from yrunner.models import local as container
from yrunner.models.local import ContainerMemory, container_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(container, "CGROUP", tmp_path)
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
def test_pages_of_files_are_room_within_the_limit(groups: Path, write) -> None:
    write(groups, "1000")
    assert container_memory() == ContainerMemory(limit=1000, used=300)
    assert container_memory().free == 700


def test_without_a_group_or_a_limit_there_is_none(groups: Path) -> None:
    assert container_memory() is None
    write_version_2(groups, "max")
    assert container_memory() is None
    write_version_1(groups, str(2**63 - 4096))
    assert container_memory() is None
