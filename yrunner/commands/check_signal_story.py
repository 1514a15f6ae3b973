"""What `yrun check` shows of the signal: on the terminal, and as a page with the curve."""

from pathlib import Path

from rich.text import Text

from yrunner.commands.check_sample import NotScored, Sample
from yrunner.commands.check_signal import Signal, Zone
from yrunner.commands.weight_curves import weight_plot
from yrunner.console import is_terminal, print_table, say, show, terminal
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema import Loss, PlainLoss, Recipe
from yrunner.reports.html import Block, Code, Figures, Plot, Report, Table, write_report
from yrunner.reports.html import Text as Prose
from yrunner.reports.terminal_plot import Bar, rounded_weight, weight_bars

COLUMNS_OF_A_LOG = 80
REFUSED_WORTH_A_WORD, HARD_WORTH_A_WORD = 0.005, 0.1
"""Shares of the targets, from which on a person is told of them."""
ZONE_COLUMNS = ("zone", "loss", "targets", "mean weight", "share of all weight")


def print_signal(recipe: Recipe, signal: Signal | NotScored) -> None:
    """Print the histogram with the weights, the zones, and what they mean; or why there is none."""
    say("")
    if isinstance(signal, NotScored):
        say(f"losses of the base: {signal.skipped}")
        return
    title = f"Loss of {signal.targets:,} targets under the base, weighed by {recipe.loss.kind}"
    bars = [
        Bar(bin_.zone, loss_range(bin_.start, bin_.end), bin_.share, bin_.mean_weight)
        for bin_ in signal.bins
    ]
    columns = terminal().width if is_terminal() else COLUMNS_OF_A_LOG
    show(Text.assemble((title, "bold"), "\n\n", weight_bars(bars, columns)))
    say("")
    print_table("Zones of the loss", ZONE_COLUMNS, [_zone_row(zone) for zone in signal.zones])
    for sentence in explain(signal, recipe.loss):
        say(sentence)


def explain(signal: Signal, loss: Loss) -> list[str]:
    """What a person should know of these figures, in sentences; none where all is as usual."""
    if isinstance(loss, PlainLoss):
        return ["loss.kind plain: every target has the weight 1, whatever its loss"]
    *_, hard, refused = signal.zones
    sentences = []
    if signal.refused >= REFUSED_WORTH_A_WORD:
        sentences.append(
            f"{signal.refused:.1%} of the targets are refused (loss of "
            f"{loss_range(refused.start, refused.end)}): nothing is learned from them, unless what "
            "is learned from others makes them likelier"
        )
    if hard.share >= HARD_WORTH_A_WORD and hard.weight_share < hard.share / 2:
        sentences.append(
            f"{hard.share:.1%} of the targets are hard for the base (loss of "
            f"{loss_range(hard.start, hard.end)}) and have {hard.weight_share:.1%} of the weight: "
            "if they are what it should learn, compare the run with loss.kind=plain"
        )
    return sentences


def loss_range(start: float, end: float | None) -> str:
    """`0 to 1.45`, `15 and above`: losses in nats."""
    return f"{start:g} and above" if end is None else f"{start:g} to {end:g}"


def write_signal_page(recipe: Recipe, sample: Sample, signal: Signal, path: Path) -> None:
    """Write the curve over the histogram, and the figures, as a page."""
    figures = Figures(
        [
            ("targets", signal.targets, f"of {signal.rows:,} rows, scored by the base"),
            ("mean weight", f"{signal.mean_weight:.3g}", f"loss: {recipe.loss.kind}"),
            ("refused", f"{signal.refused:.1%}", "of the targets have the weight 0"),
        ]
    )
    plot = Plot(
        "Weight by loss",
        weight_plot(recipe.loss, before=sample.loss_N.tolist()),
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
        "Weights as measured: the mean of the targets of each bin.",
    )
    sentences = [f"{sentence}." for sentence in explain(signal, recipe.loss)]
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
