"""What `yrun check` shows: lengths, languages, steps, learning rate, memory and disk."""

from collections.abc import Sequence

from yrunner.commands.check_facts import DataFacts, Schedule, Steps
from yrunner.commands.check_memory import DiskFacts, MemoryFacts
from yrunner.console import print_table, say
from yrunner.data.report import FileReport

BAR_WIDTH = 40
HEIGHTS = "▁▂▃▄▅▆▇█"


def print_data(facts: DataFacts) -> None:
    """Print how long the examples are, in which scripts, and how much of them is learned."""
    say("")
    most = max(number for _, number in facts.lengths)
    rows = [
        (f"up to {end:,}", number, "█" * round(BAR_WIDTH * number / most))
        for end, number in facts.lengths
    ]
    print_table("Length of the training examples in tokens", ("tokens", "examples", ""), rows)
    share = facts.targets / facts.tokens
    say(f"targets: {facts.targets:,} of {facts.tokens:,} tokens ({share:.1%})")
    say(f"longest example: {facts.longest:,} tokens")
    scripts = ", ".join(f"{name} {part:.1%}" for name, part in facts.scripts.items())
    say(f"letters: {scripts or 'none'}")


def print_unread(reports: Sequence[FileReport]) -> None:
    """Print which columns of each file say nothing in its format."""
    for report in reports:
        if report.unread:
            say(f"{report.file.name}: columns that are not read: {', '.join(report.unread)}")


def print_steps(steps: Steps, unit: str) -> None:
    """Print the exact number of updates, and how full packed rows are."""
    different = sorted(set(steps.updates_of_epochs))
    each = " or ".join(f"{number:,}" for number in different)
    say("")
    size = f"{steps.rows_per_update:,} {unit} each"
    if steps.kept_rows_per_update:
        size += f", and {steps.kept_rows_per_update:,} that are held to the base"
    say(f"updates: {steps.updates:,} in all, {each} per epoch, {size}")
    if steps.packing_fill is not None:
        say(f"packing: {steps.packed_rows:,} rows, {steps.packing_fill:.1%} of their tokens in use")


def print_schedule(schedule: Schedule) -> None:
    """Print the course of the learning rate as a curve, with figures at its quarters."""
    rates = [rate for _, rate in schedule.points]
    say(f"learning rate: {curve(rates)}")
    quarters = sorted({round(part * (len(rates) - 1) / 4) for part in range(5)})
    shown = [schedule.points[place] for place in quarters]
    figures = [f"{rate:.3g} at update {update:,}" for update, rate in shown]
    warmup = f"{schedule.warmup_updates:,} updates of warmup; " if schedule.warmup_updates else ""
    say(f"  {warmup}{', '.join(figures)}")


def curve(values: Sequence[float]) -> str:
    """The values as a line of bars, the highest full."""
    top = max(values)
    if top <= 0:
        return HEIGHTS[0] * len(values)
    return "".join(HEIGHTS[round((len(HEIGHTS) - 1) * value / top)] for value in values)


def print_memory(facts: MemoryFacts) -> None:
    """Print what one device holds at the peak, for the recipe's tuning and for the others."""
    rows = [
        (
            line.tuning,
            line.layout,
            as_gigabytes(line.weights),
            as_gigabytes(line.gradients),
            as_gigabytes(line.optimizer),
            as_gigabytes(line.activations),
            as_gigabytes(line.peak),
        )
        for line in facts.lines
    ]
    columns = ("tuning", "devices", "weights", "gradients", "optimizer", "activations", "peak")
    say("")
    print_table("Memory per device", columns, rows)
    say("\n".join(facts.notes))


def print_disk(facts: DiskFacts) -> None:
    """Print what the run writes, and whether there is room for it."""
    say("")
    say(
        f"disk: {as_gigabytes(facts.checkpoint)} per checkpoint, {facts.num_checkpoints} at the "
        f"most and one being written; the model {as_gigabytes(facts.model)}; "
        f"{as_gigabytes(facts.needed)} in all, {as_gigabytes(facts.free)} are free"
    )


def as_gigabytes(number: int) -> str:
    """`1.23 GB`, `45.6 MB`: decimal units, as disks and GPUs are sold."""
    if number >= 10**9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.1f} MB"
