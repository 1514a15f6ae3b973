"""The process with the models: one at a time, started again where it has ended, never left over."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from yrunner.commands.board import talk
from yrunner.commands.board.talk import Worker
from yrunner.errors import RunError

ECHO = """#!{python}
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("die"):
        sys.exit("out of memory")
    if asked.get("sleep"):
        time.sleep(600)
    if asked.get("fail"):
        print(json.dumps({{"error": "it cannot"}}), flush=True)
    else:
        known = {{"pid": os.getpid(), "run": sys.argv[-1], **asked}}
        print(json.dumps({{"ok": known}}), flush=True)
"""
"""Stands in for the worker, which takes seconds to load its libraries."""

Talk = Callable[[Worker], Awaitable[None]]


@pytest.fixture
def with_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Talk], None]:
    program = tmp_path / "echo"
    program.write_text(ECHO.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(talk, "sys", SimpleNamespace(executable=str(program)))

    def run(use: Talk) -> None:
        async def whole() -> None:
            worker = Worker(tmp_path, tmp_path)
            try:
                await use(worker)
            finally:
                await worker.close()

        asyncio.run(whole())

    return run


def test_requests_get_their_answers_from_one_process_per_run(with_worker: Any):
    async def use(worker: Worker) -> None:
        answers = await asyncio.gather(*(worker.ask(Path("a"), {"n": n}) for n in range(5)))
        assert [answer["n"] for answer in answers] == [*range(5)]
        assert len({answer["pid"] for answer in answers}) == 1
        other = await worker.ask(Path("b"), {})
        assert other["run"] == "b"
        assert not psutil.pid_exists(answers[0]["pid"])
        await worker.close()
        assert not psutil.pid_exists(other["pid"])

    with_worker(use)


def test_a_worker_that_has_ended_is_started_again(with_worker: Any):
    async def use(worker: Worker) -> None:
        first = await worker.ask(Path("a"), {})
        os.kill(first["pid"], signal.SIGKILL)
        second = await worker.ask(Path("a"), {})
        assert second["pid"] != first["pid"]

    with_worker(use)


def test_a_worker_that_dies_is_reported_with_its_last_words(with_worker: Any):
    async def use(worker: Worker) -> None:
        with pytest.raises(RunError, match=r"with the models has ended\. Out of memory"):
            await worker.ask(Path("a"), {"die": True})
        with pytest.raises(RunError, match="it cannot"):
            await worker.ask(Path("a"), {"fail": True})
        assert (await worker.ask(Path("a"), {"n": 1}))["n"] == 1

    with_worker(use)


def test_the_answer_to_a_page_that_was_closed_goes_to_nobody(with_worker: Any):
    async def use(worker: Worker) -> None:
        slow = asyncio.create_task(worker.ask(Path("a"), {"sleep": True}))
        await asyncio.sleep(0.3)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert (await worker.ask(Path("a"), {"n": 2}))["n"] == 2

    with_worker(use)
