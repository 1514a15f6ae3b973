"""How much memory, traffic and time does a training from 0.6B to 70B take? Computed, not measured.

    python -m benchmarks.scaling [table ...]

Prints the tables of docs/results/scaling.md, by default all, which takes half an hour of a CPU.
"""

import argparse
from collections.abc import Callable

from benchmarks.markdown import print_markdown
from benchmarks.scaling.simulated_time import (
    print_rows,
    print_sending,
    print_time,
    print_traffic,
)
from benchmarks.scaling.trainings import (
    FORMS,
    LENGTHS,
    SMALL_MIDDLE_LARGE,
    counts_of,
    every_training,
    gigabytes,
    job_of,
    possible,
    saved_tensors_bytes,
)
from yrunner.assembly.memory import Machine
from yrunner.training.deepspeed.state import SHARD_BYTES
from yrunner.training.memory.zero import FLOAT32, Sharing, memory_per_gpu, sharings_for

GPUS = (1, 2, 8, 64, 512)
MACHINES = (
    Machine(1, 24 * 10**9, host=64 * 10**9),
    Machine(1, 80 * 10**9, host=256 * 10**9),
    Machine(8, 24 * 10**9, host=512 * 10**9),
    Machine(8, 80 * 10**9, host=2 * 10**12),
)
"""One and several cards, at home and in a data center."""
COMFORTABLE = 8192
"""Tokens of a row that a layout should fit before a slower layout is considered."""


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="default: all")
    for name in parser.parse_args().tables or list(TABLES):
        TABLES[name]()


def print_fits() -> None:
    """Print the recommended layout on common machines."""
    rows = every_training(_choice, MACHINES)
    columns = ("model", "tuning", *(_title(machine) for machine in MACHINES))
    print_markdown("The simplest layout that fits, and its longest row in tokens:", columns, rows)


def _title(machine: Machine) -> str:
    return f"{machine.gpus} x {machine.memory // 10**9} GB"


def _choice(form: str, kind: str, machine: Machine) -> str | None:
    """Return the first layout that fits a comfortable row, or else any row."""
    layouts = [each for each in sharings_for(machine.gpus) if possible(kind, each)]
    longest = {each: _longest(form, kind, each, machine) for each in layouts}
    for least in (COMFORTABLE, LENGTHS[0]):
        for layout, length in longest.items():
            if length >= least:
                return f"{layout}: {length:,}"
    return None


def _longest(form: str, kind: str, layout: Sharing, machine: Machine) -> int:
    """Return the tokens of the longest row that fits, 0 if none does."""
    assert machine.host is not None
    for length in reversed(LENGTHS):
        memory = memory_per_gpu(job_of(form, kind, length), layout)
        if memory.peak <= machine.room and machine.gpus * memory.host <= machine.host:
            return length
    return 0


def print_memory() -> None:
    """Print gigabytes per GPU for every model and tuning, on one GPU and on eight."""
    columns = [Sharing(), *_layouts(8), Sharing(8, 3, offload=True)]
    rows = every_training(gigabytes, columns)
    print_markdown(
        "GB per GPU, rows of 2,048 tokens, 8 GPUs except in the first column:",
        ("model", "tuning", *(str(layout) for layout in columns)),
        rows,
    )


def print_sequences() -> None:
    """Print gigabytes per GPU by the length of the rows."""
    ways = [
        *(("lora", layout) for layout in (Sharing(), Sharing(8, 3))),
        ("qlora", Sharing()),
        *(
            ("full", layout)
            for layout in (Sharing(), Sharing(8, 2), Sharing(8, 3), Sharing(8, 3, offload=True))
        ),
    ]
    rows = [
        (form, kind, str(layout), *(gigabytes(form, kind, layout, length) for length in LENGTHS))
        for form in SMALL_MIDDLE_LARGE
        for kind, layout in ways
    ]
    columns = ("model", "tuning", "", *(f"{length:,}" for length in LENGTHS))
    print_markdown("GB per GPU by tokens of a row, 8 GPUs unless one:", columns, rows)


def print_gpus() -> None:
    """Print gigabytes per GPU by the number of GPUs."""
    rows = [
        (
            form,
            kind,
            str(_layouts(2)[index]),
            *(gigabytes(form, kind, _layouts(number)[index]) for number in GPUS),
        )
        for form in SMALL_MIDDLE_LARGE[1:]
        for kind in ("lora", "full")
        for index in range(4)
    ]
    columns = ("model", "tuning", "", *(f"{number}" for number in GPUS))
    print_markdown("GB per GPU by the number of GPUs, rows of 2,048 tokens:", columns, rows)


def print_saving() -> None:
    """Print gigabytes that saving takes with all weights trained, on any number of GPUs."""
    rows = []
    for form in FORMS:
        counts = counts_of(form, "full")
        gathered = saved_tensors_bytes(counts.largest)
        shard = min(SHARD_BYTES, saved_tensors_bytes(counts.total)) + gathered
        sizes = (gathered, shard, FLOAT32 * counts.total)
        rows.append((form, *(size / 1e9 for size in sizes)))
    columns = ("model", "each GPU", "first process, optimizer", "first process, model")
    print_markdown("GB that saving takes under ZeRO, all weights trained:", columns, rows)


def _layouts(gpus: int) -> list[Sharing]:
    """Return all layouts without offload."""
    return [Sharing(gpus), *(Sharing(gpus, stage) for stage in (1, 2, 3))]


TABLES: dict[str, Callable[[], None]] = {
    "fits": print_fits,
    "memory": print_memory,
    "sequence": print_sequences,
    "gpus": print_gpus,
    "saving": print_saving,
    "traffic": print_traffic,
    "sending": print_sending,
    "time": print_time,
    "rows": print_rows,
}

if __name__ == "__main__":
    main()
