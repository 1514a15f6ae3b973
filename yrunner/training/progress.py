"""Progress of a training run: a live view on a terminal, plain lines in a log."""

import atexit
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from yrunner.console import format_duration, is_terminal, printable, say, terminal
from yrunner.losses.nlirg import ZONES
from yrunner.training.drift import drift_points, drift_warning
from yrunner.training.preference.alarms import preference_alarms
from yrunner.training.rl.alarms import rollout_alarms

KEPT = ("teacher_divergence", "keep_divergence", "keep_text_loss", "keep_penalty")
VALIDATED = ("eval_teacher_divergence", "eval_drift")
REWARDS = (
    "reward_accuracy",
    "reward_margin",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "kl_estimate",
)
ROLLOUTS = (
    "reward",
    "equal_groups",
    "answer_tokens",
    "truncated",
    "entropy",
    "clipped",
    "kl",
    "value_loss",
    "explained_variance",
)
"""Of a run on rewards; the parts of the reward follow the first."""
SENTENCES = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "weighted_loss": "weighted {:.4f}",
    "eval_loss": "validation loss {:.4f}",
    "eval_drift": "drift {:.4f}",
    "teacher_divergence": "from the teacher {:.4f}",
    "eval_teacher_divergence": "from the teacher {:.4f}",
    "keep_divergence": "replay divergence {:.4f}",
    "keep_text_loss": "replay loss {:.4f}",
    "keep_penalty": "penalty {:.4f}",
    "mean_weight": "mean weight {:.2f}",
    "reward_accuracy": "reward accuracy {:.0%}",
    "reward_margin": "margin {:.3f}",
    "chosen_log_ratio": "chosen {:+.2f}",
    "rejected_log_ratio": "rejected {:+.2f}",
    "kl_estimate": "KL {:.3f}",
    "eval_reward_accuracy": "reward accuracy {:.0%}",
    "eval_reward_margin": "margin {:.3f}",
    "reward": "reward {:.3f}",
    "equal_groups": "equal groups {:.0%}",
    "answer_tokens": "{:.0f} tokens/answer",
    "truncated": "cut off {:.0%}",
    "entropy": "entropy {:.3f}",
    "clipped": "clipped {:.1%}",
    "kl": "KL {:.4f}",
    "value_loss": "value loss {:.4f}",
    "explained_variance": "critic explains {:.0%}",
    "eval_reward": "validation reward {:.4f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "gradient norm {:.2f}",
    "targets_per_second": "{:,.0f} targets/s",
    "memory_gib": "{:.1f} GiB",
}


def described(record: Mapping[str, Any], *keys: str) -> list[str]:
    """The values of these keys in words; a key that was not logged is left out."""
    return [SENTENCES[key].format(record[key]) for key in keys if record.get(key) is not None]


def described_rollouts(record: Mapping[str, Any]) -> list[str]:
    """What a run on rewards has logged, in words; nothing for any other."""
    if "learned" not in record:
        return []
    first, *others = described(record, *ROLLOUTS)
    parts = [
        f"{name.removeprefix('reward_')} {value:.3f}"
        for name, value in record.items()
        if name.startswith("reward_") and name != "reward_deviation"
    ]
    return [first + f" ({', '.join(parts)})" * bool(parts), *others]


def alarms_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A sentence for each alarm of a run on preferences or rewards, by its name."""
    return preference_alarms(records) | rollout_alarms(records)


Record = Mapping[str, Any]
"""One line of the metrics: what the trainer hands to `on_log`."""

# A different glyph for each zone: the bar must be readable without colours.
_ZONE_STYLES = (("█", "green"), ("▓", "blue"), ("▒", "yellow"), ("░", "red"))
_LEVELS = "▁▂▃▄▅▆▇█"
_SECONDS_BETWEEN_REFRESHES = 0.2
_WIDEST_VIEW = 96


@dataclass
class History:
    """Everything logged so far, and the position in the run."""

    title: str
    max_steps: int = 0
    step: int = 0
    seconds_left: float | None = None
    records: list[Record] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    drifts: list[tuple[float, float]] = field(default_factory=list)
    """Loss and drift of every validation that measured both."""
    validation_batches: int = 0
    """Batches of a validation that is under way; 0 when none is."""

    def add(self, record: Record, step: int) -> None:
        """Keep a training or a validation record; the trainer's closing summary is neither."""
        if "loss" in record:
            self.records.append(record)
        if "eval_loss" in record:
            self.validations.append((step, record["eval_loss"]))
            self.drifts += drift_points([record])
            self.validation_batches = 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation; the earliest of equals, and never a NaN."""
        finite = [pair for pair in self.validations if math.isfinite(pair[1])]
        return min(finite, key=lambda pair: pair[1]) if finite else None


class LiveProgress(TrainerCallback):
    """Shows the run on the main process. Use it as a context manager around `Trainer.train`.

    An interrupted trainer does not call `on_train_end`: leaving the `with` block (or, at worst,
    the interpreter) gives the terminal back.
    """

    def __init__(
        self,
        title: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or terminal()
        self._clock = clock
        self._history = History(printable(title))
        self._live: Live | None = None
        self._started_at, self._first_step, self._drawn_at = clock(), 0, -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last picture on the terminal and hand the cursor back. Safe to call twice."""
        live, self._live = self._live, None
        if live:
            live.stop()
            atexit.unregister(self.close)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock; a resumed run also gets back the curve of its first part."""
        if not state.is_world_process_zero:
            return
        self._history = History(self._history.title, state.max_steps, state.global_step)
        self._started_at, self._first_step = self._clock(), state.global_step
        for record in state.log_history:
            self._history.add(record, record.get("step", 0))
        if self._console.is_terminal:
            self._open()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self._move_to(state)
            self._draw()

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Show that a validation is running, while the bar does not move."""
        if state.is_world_process_zero:
            self._history.validation_batches += 1
            self._draw()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Record | None = None, **_: Any
    ) -> None:
        """Take in a record and show it."""
        if not state.is_world_process_zero or not logs:
            return
        self._move_to(state)
        self._history.add(logs, state.global_step)
        if self._live:
            self._draw(now=True)
        elif "loss" in logs or "eval_loss" in logs:
            say(log_line(logs, self._history))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Leave the last picture."""
        self.close()

    def _move_to(self, state: TrainerState) -> None:
        history = self._history
        history.step, history.max_steps = state.global_step, state.max_steps
        steps_done = history.step - self._first_step
        if steps_done > 0:
            seconds_per_step = (self._clock() - self._started_at) / steps_done
            history.seconds_left = seconds_per_step * max(0, history.max_steps - history.step)

    def _open(self) -> None:
        # No refresh thread: data workers fork, and would inherit a lock that it may hold.
        # Standard error is left alone when it is a file: its lines belong there.
        self._live = Live(
            draw(self._history, self._console.width),
            console=self._console,
            auto_refresh=False,
            redirect_stderr=is_terminal(sys.stderr),
        )
        atexit.register(self.close)
        self._live.start(refresh=True)

    def _draw(self, now: bool = False) -> None:
        due = self._clock() - self._drawn_at >= _SECONDS_BETWEEN_REFRESHES
        if self._live and (now or due):
            self._live.update(draw(self._history, self._console.width), refresh=True)
            self._drawn_at = self._clock()


def log_line(record: Record, history: History) -> str:
    """One record as one plain line, for a log file."""
    parts = [f"step {history.step}/{history.max_steps}", *described(record, "epoch")]
    if "eval_loss" in record:
        rewards = ("eval_reward_accuracy", "eval_reward_margin")
        if "eval_reward" in record:
            parts += described(record, "eval_reward", "eval_drift")
        else:
            parts += described(record, "eval_loss", *rewards, *VALIDATED) + _best(history)
        parts += drift_warning(history.drifts)
        return "  ".join(parts)
    parts += described(record, "loss", "weighted_loss", "mean_weight")
    shares = [f"{zone} {record[f'zone_{zone}']:.0%}" for zone in ZONES if f"zone_{zone}" in record]
    parts += [" ".join(shares)] if shares else []
    parts += described_rollouts(record) + described(record, *REWARDS, *KEPT)
    parts += described(record, "learning_rate", "targets_per_second", "memory_gib")
    known, alarms = alarms_of(history.records[:-1]), alarms_of(history.records)
    new = [sentence for name, sentence in alarms.items() if name not in known]
    return "  ".join([*parts, *_time_left(history), *new])


def draw(history: History, terminal_width: int) -> RenderableType:
    """The live view: position, curves, zones, speed."""
    width = min(terminal_width, _WIDEST_VIEW) - 4
    record = history.records[-1] if history.records else {}
    parts: list[RenderableType] = [_draw_bar(history, record), "", _draw_curves(history, width)]
    if "zone_easy" in record:
        parts += ["", zone_bar(record, width), _zone_legend(record)]
    parts += [Text(line, style="yellow") for line in drift_warning(history.drifts)]
    parts += [Text(line, style="yellow") for line in alarms_of(history.records).values()]
    facts = described_rollouts(record)
    facts += described(record, *REWARDS, "learning_rate", "mean_weight", "grad_norm", *KEPT)
    if facts := facts + described(record, "targets_per_second", "memory_gib"):
        parts += ["", Text(" · ".join(facts), style="dim")]
    return Panel(
        Group(*parts),
        title=Text(f" {history.title} ", style="bold"),
        title_align="left",
        border_style="dim",
        width=width + 4,
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """The whole course of the values in at most `width` block characters, lowest to highest.

    More values than characters are averaged in equal groups; what is not finite is left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    num_groups = min(width, len(finite))
    if num_groups <= 0:
        return ""
    edges = [index * len(finite) // num_groups for index in range(num_groups + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 0:
        return _LEVELS[0] * num_groups
    highest = len(_LEVELS) - 1
    return "".join(_LEVELS[round((mean - low) / span * highest)] for mean in means)


def zone_bar(shares: Record, width: int) -> Text:
    """The four zones side by side on exactly `width` characters; blank without any share."""
    known = [max(0.0, shares.get(f"zone_{zone}") or 0.0) for zone in ZONES]
    total = sum(known)
    if not total > 0:
        return Text(" " * width)
    bar, covered, drawn = Text(), 0.0, 0
    # Rounding the running sum, not each share, makes the pieces fill the width.
    for share, (glyph, colour) in zip(known, _ZONE_STYLES, strict=True):
        covered += share
        end = round(covered / total * width)
        bar.append(glyph * (end - drawn), style=colour)
        drawn = end
    return bar


def _draw_bar(history: History, record: Record) -> Table:
    batch = history.validation_batches
    left = [f"step {history.step}/{history.max_steps}", *described(record, "epoch")]
    right = [f"validating, batch {batch}"] if batch else _time_left(history)
    total = max(1, history.max_steps)
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=total, completed=history.step)
    row.add_row("  ".join(left), bar, "  ".join([f"{history.step / total:.0%}", *right]))
    return row


def _draw_curves(history: History, width: int) -> Table:
    weighted = (each.get("weighted_loss") for each in history.records)
    curves = {
        "loss": [each["loss"] for each in history.records],
        "weighted loss": [value for value in weighted if value is not None],
        "validation": [loss for _, loss in history.validations],
        "drift": [drift for _, drift in history.drifts],
    }
    styles = {"loss": "cyan", "weighted loss": "magenta", "validation": "green", "drift": "yellow"}
    rows = Table.grid(padding=(0, 2))
    for label, values in curves.items():
        note = "  ".join(_best(history)) if label == "validation" else ""
        if values:
            curve = sparkline(values, width - 27 - len(note))
            drawn = Text.assemble((curve, styles[label]), ("  " + note, "dim"))
            rows.add_row(label, Text(f"{values[-1]:.4f}", style="bold"), drawn)
    return rows


def _zone_legend(record: Record) -> Text:
    legend = Text()
    for zone, (glyph, colour) in zip(ZONES, _ZONE_STYLES, strict=True):
        legend.append(f"{glyph} ", style=colour)
        legend.append(f"{zone} {record.get(f'zone_{zone}') or 0.0:.0%}   ")
    return legend


def _best(history: History) -> list[str]:
    return ["best {1:.4f} at step {0}".format(*history.best)] if history.best else []


def _time_left(history: History) -> list[str]:
    left = history.seconds_left
    return [] if left is None else [f"{format_duration(left)} left"]
