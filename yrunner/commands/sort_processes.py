"""Several processes share the rows of a sort: one for each GPU, each with a model of its own."""

import signal
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch.multiprocessing import get_context

from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import read_data
from yrunner.data.store import Examples
from yrunner.errors import RunError, YRunnerError
from yrunner.models.quiet import quiet_libraries
from yrunner.recipe.schema import Recipe

Share = tuple[int, int]
"""Number of a process, from 0, and how many there are."""
Measure = Callable[[Recipe, Any, Examples, Path, Share, Callable[[int], None]], None]
"""Measures a share of the rows, and says of each how many tokens it has."""

LOOK_AFTER = 1.0
"""Seconds without news after which it is looked whether all processes are alive."""
LAST = None
"""The last message of a process."""


def num_processes(recipe: Recipe) -> int:
    """Processes that share the rows: as many as there are GPUs, if the recipe names no number."""
    processes = recipe.sort.processes
    return max(1, torch.cuda.device_count()) if processes == "auto" else processes


def measure_together(
    recipe: Recipe, folder: Path, processes: int, measure: Measure, advance: Callable[[int], None]
) -> None:
    """Let `processes` new processes measure the rows into `folder`.

    Where one fails all end. Raises `RunError` with its message, or `RuntimeError` with its
    traceback.
    """
    context = get_context("spawn")
    messages: Queue[Any] = context.Queue()
    workers: list[BaseProcess] = [
        context.Process(
            target=_work, args=(recipe, folder, measure, (rank, processes), messages), daemon=True
        )
        for rank in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
        num_working = processes
        while num_working:
            message = _next_message(messages, workers)
            if isinstance(message, Exception):
                raise message
            if message is LAST:
                num_working -= 1
            else:
                advance(message)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _next_message(messages: "Queue[Any]", workers: list[BaseProcess]) -> Any:
    while True:
        try:
            return messages.get(timeout=LOOK_AFTER)
        except Empty:
            for rank, worker in enumerate(workers):
                if worker.exitcode:
                    raise RunError(
                        f"process {rank} of the sort ended with exit code {worker.exitcode}",
                        remedy="give the rows more memory, or set sort.processes to fewer",
                    ) from None


def _work(
    recipe: Recipe, folder: Path, measure: Measure, share: Share, messages: "Queue[Any]"
) -> None:
    """What a process does. Ctrl-C reaches it as well, but the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, processes = share
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        with quiet_libraries():
            tokenizer = recipe_tokenizer(recipe)
            examples = read_data(recipe, tokenizer).train
            measure(recipe, tokenizer, examples, folder, share, messages.put)
        messages.put(LAST)
    except YRunnerError as error:
        messages.put(RunError(error.message, remedy=error.remedy))
    except Exception:  # noqa: BLE001 - the parent raises it
        messages.put(RuntimeError(traceback.format_exc()))
