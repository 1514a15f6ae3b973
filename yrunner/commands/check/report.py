"""The output of `yrun check`: tables on the terminal, and a page with the weight curve."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from yrunner.assembly.memory import MemoryFacts, MemoryLine
from yrunner.assembly.preflight import DiskFacts
from yrunner.assembly.report import weight_plot
from yrunner.commands.check.facts import DataFacts, Schedule, Steps
from yrunner.commands.check.signal import NotScored, Sample, Signal, Zone
from yrunner.console import as_gigabytes, counted, is_terminal, print_table, say, show, terminal
from yrunner.data.dataset.preference import AnswerFacts
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema.recipe import Loss, PlainLoss, Recipe
from yrunner.reports.html import Block, Code, KeyFigures, Plot, Report, Table, write_report
from yrunner.reports.html import Text as Prose
from yrunner.reports.terminal_plot import ShareBar, rounded_weight, weight_bars

COLUMNS_OF_A_LOG = 80
NOTABLE_REFUSED, NOTABLE_HARD = 0.005, 0.1
"""Shares of the targets that are worth a sentence."""
BAR_WIDTH = 40
HEIGHTS = "▁▂▃▄▅▆▇█"
ZONE_COLUMNS = ("zone", "loss", "targets", "mean weight", "share of all weight")


def print_data(facts: DataFacts) -> None:
    """Print lengths, targets and scripts of the examples."""
    say("")
    most = max(number for _, number in facts.lengths)
    rows = [
        (f"up to {end:,}", number, "█" * round(BAR_WIDTH * number / most))
        for end, number in facts.lengths
    ]
    what = "examples" if facts.answers is None else "answers"
    if not facts.targets:
        what = "prompts"
    print_table(f"Length of the training {what} in tokens", ("tokens", what, ""), rows)
    if facts.targets:
        share = facts.targets / facts.tokens
        say(f"targets: {facts.targets:,} of {facts.tokens:,} tokens ({share:.1%})")
    say(f"longest {what[:-1]}: {counted(facts.longest, 'token')}")
    scripts = ", ".join(f"{name} {part:.1%}" for name, part in facts.scripts.items())
    say(f"letters: {scripts or 'none'}")
    if facts.answers is not None:
        print_answers(facts.answers)


def print_answers(facts: AnswerFacts) -> None:
    """Print what is known about better and worse answers, and what length alone would predict."""
    say("")
    names = ("chosen", "rejected") if facts.longer_wins is not None else ("good", "bad")
    rows = [
        (name, side.answers, side.tokens, side.targets, f"{side.mean_length:.1f}")
        for name, side in zip(names, (facts.better, facts.worse), strict=True)
    ]
    columns = ("", "answers", "tokens", "targets", "mean length in targets")
    print_table("Better and worse answers", columns, rows)
    say(f"different prompts: {facts.prompts:,}")
    if facts.longer_wins is None or facts.equally_long is None:
        return
    say(
        f"longer wins: {facts.longer_wins:.1%} of the chosen answers are longer than the rejected "
        f"ones, {facts.equally_long:.1%} as long"
    )
    if facts.shared_prompts != facts.better.answers:
        say(
            f"prompts with the same tokens on both sides: {facts.shared_prompts:,} of "
            f"{facts.better.answers:,}"
        )


def print_steps(steps: Steps, unit: str) -> None:
    """Print the exact number of updates, and the fill of packed rows."""
    say("")
    size = f"{counted(steps.rows_per_update, unit)} each"
    if steps.kept_rows_per_update:
        size += f", plus {counted(steps.kept_rows_per_update, 'replay row')}"
    say(f"updates: {steps.updates:,} in total, {steps.updates_per_epoch:,} per epoch, {size}")
    if steps.packed_rows is not None:
        rows = counted(steps.packed_rows, "row")
        say(f"packing: {rows}, {steps.packing_fill:.1%} of their tokens in use")


def print_schedule(schedule: Schedule) -> None:
    """Print the learning rate as a curve, with values at its quarters."""
    rates = [rate for _, rate in schedule.points]
    say(f"learning rate: {curve(rates)}")
    quarters = sorted({round(part * (len(rates) - 1) / 4) for part in range(5)})
    shown = [schedule.points[index] for index in quarters]
    figures = [f"{rate:.3g} at update {update:,}" for update, rate in shown]
    updates = counted(schedule.warmup_updates, "update")
    warmup = f"{updates} of warmup; " if schedule.warmup_updates else ""
    say(f"  {warmup}{', '.join(figures)}")


def curve(values: Sequence[float]) -> str:
    """The values as a line of bars."""
    top = max(values)
    if top <= 0:
        return HEIGHTS[0] * len(values)
    return "".join(HEIGHTS[round((len(HEIGHTS) - 1) * value / top)] for value in values)


def print_memory(facts: MemoryFacts, advice: Sequence[str]) -> None:
    """Print which kinds of tuning fit, what the recipe needs, and advice."""
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
    say(f"planned for {facts.machine}; to plan for another: --gpus 8 --memory 80GB")
    print_table("What fits", ("tuning", *layouts), rows)
    _print_parts([line for line in facts.lines if line.tuning == own])
    say("\n".join(facts.notes))
    if advice:
        say("\n  ".join(["this recipe does not fit. Changes that would make it fit:", *advice]))


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
    """Print the disk space that the run needs."""
    say("")
    say(
        f"disk: {as_gigabytes(facts.checkpoint)} per checkpoint, up to {facts.num_checkpoints} "
        f"at once; {as_gigabytes(facts.model)} for the model; "
        f"{as_gigabytes(facts.needed)} in total, {as_gigabytes(facts.free)} free"
    )


def print_signal(recipe: Recipe, signal: Signal | NotScored) -> None:
    """Print the histogram with weights, the zones, and what they mean, or why there is none."""
    say("")
    if isinstance(signal, NotScored):
        what = "answers" if recipe.train.stage == "rl" else "losses"
        say(f"{what} of the base: {signal.skipped}")
        return
    targets = counted(signal.targets, "target")
    weighted = "" if recipe.learns_from_pairs else f", weighted by {recipe.loss.kind}"
    title = f"Loss of {targets} under the base{weighted}"
    bars = [
        ShareBar(bin_.zone, loss_range(bin_.start, bin_.end), bin_.share, bin_.mean_weight)
        for bin_ in signal.bins
    ]
    columns = terminal().width if is_terminal() else COLUMNS_OF_A_LOG
    show(Text.assemble((title, "bold"), "\n\n", weight_bars(bars, columns)))
    say("")
    print_table("Zones of the loss", ZONE_COLUMNS, [_zone_row(zone) for zone in signal.zones])
    if (wins := signal.base_wins) is not None:
        say(
            f"the base prefers the better answer in {wins.whole:.1%} of "
            f"{counted(wins.pairs, 'pair')} (by likelihood per token: {wins.per_token:.1%})"
        )
    if not recipe.learns_from_pairs:
        for sentence in explain(signal, recipe.loss):
            say(sentence)


def explain(signal: Signal, loss: Loss) -> list[str]:
    """Sentences that explain unusual figures."""
    if isinstance(loss, PlainLoss):
        return ["loss.kind plain: every target has the weight 1, whatever its loss"]
    *_, hard, refused = signal.zones
    sentences = []
    if signal.refused >= NOTABLE_REFUSED:
        sentences.append(
            f"{signal.refused:.1%} of the targets are refused (loss of "
            f"{loss_range(refused.start, refused.end)}): nothing is learned from them, unless "
            "learning other targets lowers their loss"
        )
    if hard.share >= NOTABLE_HARD and hard.weight_share < hard.share / 2:
        sentences.append(
            f"{hard.share:.1%} of the targets are hard for the base (loss of "
            f"{loss_range(hard.start, hard.end)}) and have {hard.weight_share:.1%} of the weight: "
            "if the model should learn them, compare the run with loss.kind=plain"
        )
    return sentences


def loss_range(start: float, end: float | None) -> str:
    """`0 to 1.45`, `15 and above`: losses in nats."""
    return f"{start:g} and above" if end is None else f"{start:g} to {end:g}"


def write_signal_page(recipe: Recipe, sample: Sample, signal: Signal, path: Path) -> None:
    """Write the page with the weight curve, the histogram and the figures."""
    figures = KeyFigures(
        [
            ("targets", signal.targets, f"of {counted(signal.rows, 'row')}, scored by the base"),
            ("mean weight", f"{signal.mean_weight:.3g}", f"loss: {recipe.token_loss.kind}"),
            ("refused", f"{signal.refused:.1%}", "of the targets have the weight 0"),
        ]
    )
    plot = Plot(
        "Weight by loss",
        weight_plot(recipe.token_loss, before=sample.loss_N.tolist()),
        "Above: the weight of a target by its loss. Below: the losses of the sample.",
    )
    zones = Table("Zones", ZONE_COLUMNS, [_zone_row(zone) for zone in signal.zones])
    bins = Table(
        "Bins",
        ("loss", "share of the targets", "mean weight"),
        [
            (
                loss_range(bin_.start, bin_.end),
                f"{bin_.share:.1%}",
                rounded_weight(bin_.mean_weight),
            )
            for bin_ in signal.bins
        ],
        "Measured weights: the mean over the targets of each bin.",
    )
    sentences = [f"{sentence}." for sentence in explain(signal, recipe.token_loss)]
    meaning = [Prose("\n\n".join(sentences))] if sentences else []
    recipe_text = Code("Recipe", recipe_to_yaml(recipe))
    blocks: list[Block] = [figures, *meaning, plot, zones, bins, recipe_text]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(Report(recipe.name, blocks, subtitle="yrun check: before training"), path)


def _zone_row(zone: Zone) -> tuple[str, str, str, str, str]:
    return (
        zone.name,
        loss_range(zone.start, zone.end),
        f"{zone.share:.1%}",
        rounded_weight(zone.mean_weight),
        f"{zone.weight_share:.1%}",
    )
