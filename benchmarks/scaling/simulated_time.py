"""Bytes sent, seconds per update and hours of training, simulated for H100s."""

from collections.abc import Iterator

from benchmarks.markdown import Cell, print_markdown
from benchmarks.scaling.traffic_formula import traffic_per_gpu
from benchmarks.scaling.trainings import (
    LENGTHS,
    SMALL_MIDDLE_LARGE,
    counts_of,
    every_training,
    job_of,
    operations_of,
    possible,
)
from yrunner.assembly.memory import Machine
from yrunner.training.memory.trace import StepTrace
from yrunner.training.memory.zero import Sharing, Workload, memory_per_gpu

PEAK = 989e12
"""Operations per second of an H100 in bfloat16, from its data sheet."""
REACHED = 0.4
"""Share of that peak that such trainings reach: an assumption, not measured here."""
LINK = 450e9
"""Bytes per second that an H100 sends within its machine, from its data sheet."""
NETWORK = 50e9
"""Bytes per second of each GPU between machines: one adapter of 400 Gbit/s."""
GPUS_OF_MACHINE = 8
CARD = Machine(1, 80 * 10**9)
ROW = 8192
"""Tokens of a row in tables that do not compare lengths."""
SHARINGS = (Sharing(8), *(Sharing(8, stage) for stage in (1, 2, 3)))
NO_TRACE = StepTrace(0, 0, ((0, 0),), ((0, 0),), ((0, 0),))
"""Traffic does not depend on memory."""
CORPORA = tuple(10**power for power in range(4, 9))
TOKENS_OF_ROW = 200
STORED, COLUMNS, PLANNED, PACKED = 841, 53, 127, 74
"""Bytes of such a row on disk, in memory, and in the plan without and with packing, measured by
`python -m benchmarks.scaling.rows`."""
TRAININGS = (
    ("Qwen3 0.6B", "full", Sharing(8, 2)),
    ("Qwen3 8B", "lora", Sharing(8, 2)),
    ("Qwen3 8B", "full", Sharing(8, 3)),
    ("Llama 70B", "lora", Sharing(8, 3)),
    ("Llama 70B", "full", Sharing(64, 3)),
)


def print_traffic() -> None:
    """Print the gigabytes that each GPU sends for an update of one micro-batch."""
    rows = every_training(_gigabytes_sent, SHARINGS)
    columns = ("model", "tuning", *(str(layout) for layout in SHARINGS))
    print_markdown("GB that each of 8 GPUs sends for an update of one micro-batch:", columns, rows)


def print_sending() -> None:
    """Print seconds of computing and of sending by the length of the rows."""
    rows = [
        (
            form,
            kind,
            f"{layout} on {layout.gpus}",
            seconds_of_sending(form, kind, layout),
            *(_seconds_if_it_fits(form, kind, layout, length) for length in LENGTHS),
        )
        for form in SMALL_MIDDLE_LARGE
        for kind in ("lora", "full")
        for layout in (Sharing(8, 2), Sharing(8, 3), Sharing(64, 3))
    ]
    columns = ("model", "tuning", "", "sending", *(f"{length:,}" for length in LENGTHS))
    print_markdown(
        "Seconds of an update: sending, and computing by tokens of the one row on each GPU:",
        columns,
        [row for row in rows if any(row[4:])],
    )


def _seconds_if_it_fits(form: str, kind: str, layout: Sharing, length: int) -> float | None:
    if memory_per_gpu(job_of(form, kind, length), layout).peak > CARD.room:
        return None
    return seconds_of_computing(form, kind, length)


def print_time() -> None:
    """Print tokens per second by the number of GPUs, without and with overlapped communication."""
    rows = [
        (form, kind, *_speeds(form, kind, layout))
        for form in SMALL_MIDDLE_LARGE
        for kind in ("lora", "full")
        for layout in (Sharing(8, 2), *(Sharing(gpus, 3) for gpus in (8, 64, 512)))
        if memory_per_gpu(job_of(form, kind, ROW), layout).peak <= CARD.room
    ]
    columns = ("model", "tuning", "", "GPUs", "computing, s", "sending, s", "tokens per second")
    print_markdown(f"An update of one row of {ROW:,} tokens on each GPU:", columns, rows)


def _speeds(form: str, kind: str, layout: Sharing) -> Iterator[Cell]:
    computing, sending = (
        seconds_of_computing(form, kind, ROW),
        seconds_of_sending(form, kind, layout),
    )
    tokens = layout.gpus * ROW
    yield str(layout)
    yield f"{layout.gpus:,}"
    yield computing
    yield sending
    yield f"{tokens / (computing + sending):,.0f} to {tokens / max(computing, sending):,.0f}"


def print_rows() -> None:
    """Print disk, memory and hours by the number of rows."""
    sizes = [
        (
            f"{number:,}",
            number * TOKENS_OF_ROW / 1e6,
            *(number * size / 1e9 for size in (STORED, COLUMNS, PLANNED, PACKED)),
        )
        for number in CORPORA
    ]
    columns = ("rows", "million tokens", "disk", "columns", "plan", "plan with packing")
    print_markdown(f"GB on disk and in memory, rows of {TOKENS_OF_ROW} tokens:", columns, sizes)
    hours = [
        (
            form,
            kind,
            str(layout),
            f"{layout.gpus}",
            *(_hours(form, kind, layout, n) for n in CORPORA),
        )
        for form, kind, layout in TRAININGS
    ]
    print_markdown(
        f"Hours of an epoch of such rows, packed into {ROW:,}:",
        ("model", "tuning", "", "GPUs", *(f"{number:,}" for number in CORPORA)),
        hours,
    )


def _hours(form: str, kind: str, layout: Sharing, rows: int) -> float:
    """Return the hours of an epoch without overlapped communication."""
    seconds = seconds_of_computing(form, kind, ROW) + seconds_of_sending(form, kind, layout)
    return rows * TOKENS_OF_ROW / ROW / layout.gpus * seconds / 3600


def seconds_of_computing(form: str, kind: str, length: int) -> float:
    """Return the seconds of computing an update of one row per GPU."""
    return operations_of(form, kind, length).total / (PEAK * REACHED)


def seconds_of_sending(form: str, kind: str, layout: Sharing) -> float:
    """Return the seconds of sending for the same update, over the slowest link."""
    speed = LINK if layout.gpus <= GPUS_OF_MACHINE else NETWORK
    return _bytes_sent(form, kind, layout) / speed


def _gigabytes_sent(form: str, kind: str, layout: Sharing) -> float | None:
    return _bytes_sent(form, kind, layout) / 1e9 if possible(kind, layout) else None


def _bytes_sent(form: str, kind: str, layout: Sharing) -> int:
    job = Workload(NO_TRACE, counts_of(form, kind), bytes_per_number=2, bucket_numbers=1)
    return traffic_per_gpu(job, layout).total
