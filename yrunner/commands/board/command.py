"""`yrun board`: a local page of all runs."""

from importlib.util import find_spec
from pathlib import Path

from yrunner.console import say, warn
from yrunner.errors import MissingError, YRunnerError

NEEDED = ("starlette", "uvicorn")
LOCAL = "127.0.0.1"


def board(folder: Path, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, and print its address. Runs that it started go on.

    Raises `MissingError` without the packages of the extra `board`, `YRunnerError` if there is no
    such folder or the port is taken.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingError(
            f"yrun board needs the {'package' if len(missing) == 1 else 'packages'} "
            f"{' and '.join(missing)}",
            remedy="run pip install 'yrunner[board]'",
        )
    if not folder.is_dir():
        raise YRunnerError(
            f"{folder} is not a folder", remedy="name the folder that holds your run folders"
        )
    from yrunner.commands.board.server import Board, serve

    page = Board(folder, host=host)
    with page.listening(port) as socket:
        if host != LOCAL:
            warn(f"{host} is open to other machines; whoever has the address can start runs")
        say(f"board: {page.address}")
        say("open this address in a browser; Ctrl-C ends the page, not the runs")
        serve(page, socket)
