"""Speak with the process that holds a run's models: one at a time, started when it is needed."""

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from yrunner.errors import RunError

LONGEST_LINE = 32 * 2**20
LAST_LINES = 6


class Worker:
    """The worker of the run that was asked last; another run's takes its place."""

    def __init__(self, root: Path, folder: Path) -> None:
        """`root`: of the runs; `folder`: where the board was started."""
        self._root, self._here = root, folder
        self._run: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def ask(self, run: Path, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a run's models. Raises `RunError` with the worker's own words."""
        async with self._turn:
            is_used = self._process is not None
            line = await self._exchange(run, request)
            if not line and is_used:  # it has just ended because nobody had asked for a while
                line = await self._exchange(run, request)
        if not line:
            raise RunError("the process with the models has ended", remedy=self._last_words())
        said = json.loads(line)
        if "error" in said:
            raise RunError(said["error"])
        return dict(said["ok"])

    async def _exchange(self, run: Path, request: dict[str, Any]) -> bytes:
        """One request and its answer; empty if the process has ended."""
        process = await self._started(run)
        assert process.stdin is not None and process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except (ConnectionError, ValueError):
            line = b""
        finally:
            if not line:  # also where the page was closed: the next would read this answer
                await self._end()
        return line

    async def close(self) -> None:
        """End the worker."""
        async with self._turn:
            await self._end()

    async def _started(self, run: Path) -> asyncio.subprocess.Process:
        process = self._process
        if process is not None and process.returncode is None and self._run == run:
            return process
        await self._end()
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "yrunner.commands.board.worker", str(run)),
                cwd=self._here,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                limit=LONGEST_LINE,
            )
        self._run = run
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    @property
    def _log(self) -> Path:
        return self._root / ".board" / "worker.log"

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return " / ".join(lines[-LAST_LINES:]) or "look at what else uses the memory"
