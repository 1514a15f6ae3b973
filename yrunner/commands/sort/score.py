"""Scores of all rows by the base of a recipe, computed in one process or one per GPU."""

import json
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch.multiprocessing import get_context

from yrunner.assembly.run import Run
from yrunner.console import counted, progress, say
from yrunner.errors import RunError, YRunnerError
from yrunner.models.adapters import attach_adapter
from yrunner.models.errors import silence_libraries
from yrunner.models.load import check_vocabulary
from yrunner.models.model_key import model_key
from yrunner.recipe.schema.model import AdapterTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.measure import TokenScores, score_by_length
from yrunner.scoring.score_file import ScoreFile, row_hashes
from yrunner.training.arguments import token_weight

Share = tuple[int, int]
"""Rank and number of processes."""
Measure = Callable[[Run, Path, Share, Callable[[int], None]], None]
"""Scores a share of the rows, and reports the tokens of each."""

SECONDS_BETWEEN_CHECKS = 1.0
"""Seconds without a message after which the processes are checked."""
LAST = None
"""The last message of a process."""


def measure_rows(run: Run, folder: Path) -> Sequence[TokenScores]:
    """The scores of every example by the model that training starts from, in order.

    Scores in `folder` are reused. Raises `ModelError` if the base cannot be loaded.
    """
    examples = run.dataset.train.examples
    lengths = examples.lengths.tolist()
    with ScoreFile.open(folder, _key(run), row_hashes(examples)) as file:
        if file.done:
            say(f"already scored: {len(file.done):,} of {counted(len(examples), 'example')}")
        if len(file.done) < len(examples):
            if run.halves_products:
                say(f"computed in {run.looks_in} (model.dtype: auto)")
            # In tokens, because rows differ in length and the longest come first.
            with progress("scoring rows with the base, tokens", sum(lengths)) as advance:
                advance(sum(lengths[index] for index in file.done))
                processes = num_processes(run.recipe)
                if processes == 1:
                    measure_share(run, folder, (0, 1), advance)
                else:
                    measure_together(run.recipe, folder, processes, measure_share, advance)
        return file.read(examples.origin)


def measure_share(run: Run, folder: Path, share: Share, advance: Callable[[int], None]) -> None:
    """Score the rows of one process, and report the tokens of each."""
    recipe, examples = run.recipe, run.dataset.train.examples
    with ScoreFile.open(folder, _key(run), row_hashes(examples), rank=share[0]) as file:
        scores = score_by_length(
            _load_base(run),
            examples,
            pad_token_id=run.tokenizer.pad_token_id,
            max_tokens=run.max_tokens,
            weight=token_weight(recipe.token_loss)[0],
            done=file.done,
            shard=share,
            wants_context=recipe.sort.asks_neighbours,
        )
        for index, scored in scores:
            file.append(index, scored)
            advance(len(examples[index].input_ids))


def num_processes(recipe: Recipe) -> int:
    """Processes that share the rows; `auto` means one per GPU."""
    processes = recipe.sort.processes
    return max(1, torch.cuda.device_count()) if processes == "auto" else processes


def measure_together(
    recipe: Recipe, folder: Path, processes: int, measure: Measure, advance: Callable[[int], None]
) -> None:
    """Score the rows into `folder` in `processes` new processes.

    If one fails, all end: raises `RunError` with its message, or `RuntimeError` with its traceback.
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
            return messages.get(timeout=SECONDS_BETWEEN_CHECKS)
        except Empty:
            for rank, worker in enumerate(workers):
                if worker.exitcode:
                    raise RunError(
                        f"process {rank} of the sort ended with exit code {worker.exitcode}",
                        remedy="free some memory, or lower sort.processes",
                    ) from None


def _work(
    recipe: Recipe, folder: Path, measure: Measure, share: Share, messages: "Queue[Any]"
) -> None:
    """Run one process. It ignores Ctrl-C, because the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, processes = share
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        with silence_libraries():
            measure(Run(recipe), folder, share, messages.put)
        messages.put(LAST)
    except YRunnerError as error:
        messages.put(RunError(error.message, remedy=error.remedy))
    except Exception:  # noqa: BLE001 - the parent raises it
        messages.put(RuntimeError(traceback.format_exc()))


def _load_base(run: Run) -> Any:
    model = run.load_base()
    check_vocabulary(model, run.tokenizer)
    adapter = _adapter(run.recipe)
    if adapter is None:
        return model
    return attach_adapter(model, adapter, trainable=False).to(model.device)


def _adapter(recipe: Recipe) -> Path | None:
    """The adapter that training would continue from."""
    tuning = recipe.tuning
    if isinstance(tuning, AdapterTuning) and tuning.adapter is not None:
        return Path(tuning.adapter)
    return None


def _key(run: Run) -> str:
    """Everything but its tokens that a row's scores depend on, to the last digit."""
    recipe, adapter = run.recipe, _adapter(run.recipe)
    facts = {
        "base": run.base_key,
        "adapter": None if adapter is None else model_key(adapter),
        "dtype": run.looks_in,
        "attention": recipe.model.attention,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "max_tokens": run.max_tokens,
        "context": recipe.sort.asks_neighbours,
        "loss": recipe.token_loss.model_dump(mode="json"),
    }
    return json.dumps(facts, sort_keys=True)
