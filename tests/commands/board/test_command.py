"""`yrun board` as a command: what it refuses, and what it never loads."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.board.conftest import needs_extra
from yrunner.commands.board import command
from yrunner.errors import MissingError, YRunnerError


def test_without_its_packages_it_names_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as raised:
        command.board(tmp_path, host="127.0.0.1", port=0)
    assert raised.value.exit_code == 3
    assert str(raised.value) == (
        "yrun board needs the packages starlette and uvicorn. Run pip install 'yrunner[board]'"
    )


@needs_extra
def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(YRunnerError, match="nowhere is not a folder"):
        command.board(tmp_path / "nowhere", host="127.0.0.1", port=0)


@needs_extra
def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_named(tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(YRunnerError, match=rf"127\.0\.0\.1:{port} cannot be used"):
            command.board(tmp_path, host="127.0.0.1", port=port)
    with pytest.raises(YRunnerError, match=r"no\.such\.host:0 cannot be used"):
        command.board(tmp_path, host="no.such.host", port=0)


@needs_extra
def test_the_server_loads_neither_torch_nor_the_recipes():
    program = (
        "import sys, yrunner.commands.board.server\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
