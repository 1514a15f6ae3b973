"""What `yrun check` shows: lengths, languages, steps, learning rate, memory and disk."""

from collections.abc import Sequence

from yrunner.commands.check_facts import DataFacts, Schedule, Steps
from yrunner.commands.check_memory import MemoryFacts, MemoryLine
from yrunner.commands.disk_space import DiskFacts
from yrunner.console import as_gigabytes, print_table, say
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


def print_memory(facts: MemoryFacts, advice: Sequence[str]) -> None:
    """Print which kinds of tuning fit on the machine, what the recipe's own needs, and advice."""
    own = next((line.tuning for line in facts.lines if line.is_own), None)
    layouts = list(dict.fromkeys(line.layout for line in facts.lines))
    lines = {(line.tuning, line.layout): line for line in facts.lines}
    rows = [
        (
            f"{tuning} (this recipe)" if tuning == own else tuning,
            *(_fit(lines.get((tuning, layout))) for layout in layouts),
        )
        for tuning in dict.fromkeys(line.tuning for line in facts.lines)
    ]
    say("")
    say(f"planned for {facts.machine}; for another: --gpus 8 --memory 80GB")
    print_table("What fits", ("tuning", *layouts), rows)
    _print_parts([line for line in facts.lines if line.tuning == own])
    say("\n".join(facts.notes))
    if advice:
        say("\n  ".join(["this recipe does not fit there. What would:", *advice]))


def _fit(line: MemoryLine | None) -> str | None:
    if line is None:
        return None
    return f"{'fits' if line.fits else 'no'}, {as_gigabytes(line.peak)}"


def _print_parts(lines: Sequence[MemoryLine]) -> None:
    rows = [
        (
            line.layout,
            *map(
                as_gigabytes,
                (
                    line.weights,
                    line.gradients,
                    line.optimizer,
                    line.activations,
                    line.buffers,
                    line.peak,
                    line.host,
                ),
            ),
        )
        for line in lines
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "peak", "host memory")
    print_table("Memory per device of this recipe", ("", *parts), rows)


def print_disk(facts: DiskFacts) -> None:
    """Print what the run writes, and whether there is room for it."""
    say("")
    say(
        f"disk: {as_gigabytes(facts.checkpoint)} per checkpoint, {facts.num_checkpoints} at the "
        f"fullest moment; the model {as_gigabytes(facts.model)}; "
        f"{as_gigabytes(facts.needed)} in all, {as_gigabytes(facts.free)} are free"
    )
