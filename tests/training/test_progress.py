"""The live view shows the run's figures; a log gets plain lines; the terminal is given back."""

import io
import math
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from yrunner.console import format_duration
from yrunner.training.progress import History, LiveProgress, draw, log_line, sparkline, zone_bar

RECORD = {
    "loss": 1.2345,
    "weighted_loss": 0.8123,
    "mean_weight": 0.61,
    "zone_easy": 0.41,
    "zone_learning": 0.50,
    "zone_hard": 0.09,
    "zone_refused": 0.0,
    "learning_rate": 9.5e-4,
    "grad_norm": 0.83,
    "targets": 4000,
    "targets_per_second": 12345.0,
    "memory_gib": 1.2,
    "epoch": 0.5,
}


class FakeClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def state_at(step, max_steps=320, main_process=True, log_history=()):
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        is_world_process_zero=main_process,
        log_history=list(log_history),
    )


def terminal_console(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor")


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False)


def drawn(history, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(history, width))
    return console.file.getvalue()


def test_a_log_line_holds_every_figure(capsys):
    clock = FakeClock()
    progress = LiveProgress("run", console=plain_console(), clock=clock)
    progress.on_train_begin(None, state_at(0), None)
    clock.seconds = 21.57
    progress.on_log(None, state_at(40), None, logs=RECORD)
    assert capsys.readouterr().out == (
        "step 40/320  epoch 0.50  loss 1.2345  weighted 0.8123  mean weight 0.61  "
        "easy 41% learning 50% hard 9% refused 0%  lr 9.5e-04  12,345 targets/s  1.2 GiB  "
        "2:31 left\n"
    )


def test_a_log_has_one_line_per_record_and_no_control_characters(capsys):
    with LiveProgress("run", console=plain_console()) as progress:
        progress.on_train_begin(None, state_at(0), None)
        for step in (10, 20):
            progress.on_step_end(None, state_at(step), None)
            progress.on_log(None, state_at(step), None, logs=RECORD)
        progress.on_log(None, state_at(20), None, logs={"eval_loss": 1.5, "epoch": 1.0})
        progress.on_log(None, state_at(20), None, logs={"train_runtime": 3.0})
        progress.on_train_end(None, state_at(20), None)
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert "validation loss 1.5000  best 1.5000 at step 20" in out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_only_the_main_process_shows_anything(capsys):
    progress = LiveProgress("run", console=terminal_console())
    progress.on_train_begin(None, state_at(0, main_process=False), None)
    progress.on_log(None, state_at(1, main_process=False), None, logs=RECORD)
    assert capsys.readouterr() == ("", "")
    assert progress._console.file.getvalue() == ""


def test_the_live_view_contains_the_figures_and_survives_an_interrupt():
    console = terminal_console()
    clock = FakeClock()
    streams = sys.stdout, sys.stderr
    with (
        pytest.raises(KeyboardInterrupt),
        LiveProgress("法律 [red]", console=console, clock=clock) as progress,
    ):
        progress.on_train_begin(None, state_at(0), None)
        clock.seconds = 10.0
        progress.on_log(None, state_at(80), None, logs=RECORD)
        progress.on_log(None, state_at(80), None, logs={"eval_loss": 1.1})
        raise KeyboardInterrupt
    shown = console.file.getvalue()
    for figure in ("法律 [red]", "80/320", "1.2345", "0.8123", "1.1000", "12,345", "0:30 left"):
        assert figure in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor must be back"
    assert (sys.stdout, sys.stderr) == streams, "the streams must be back"


def test_closing_twice_or_before_the_start_does_nothing():
    progress = LiveProgress("run", console=terminal_console())
    progress.close()
    progress.on_train_begin(None, state_at(0), None)
    progress.close()
    printed = progress._console.file.getvalue()
    progress.close()
    assert progress._console.file.getvalue() == printed


def test_the_view_is_redrawn_at_most_five_times_a_second():
    clock = FakeClock()
    with LiveProgress("run", console=terminal_console(), clock=clock) as progress:
        progress.on_train_begin(None, state_at(0), None)
        before = progress._console.file.getvalue().count("step ")
        for step in range(1, 101):
            clock.seconds = step / 100
            progress.on_step_end(None, state_at(step), None)
        redrawn = progress._console.file.getvalue().count("step ") - before
    assert 4 <= redrawn <= 6


def test_a_resumed_run_shows_its_earlier_curve_and_counts_its_own_time():
    clock = FakeClock()
    earlier = [{**RECORD, "step": 10}, {"eval_loss": 0.9, "step": 10}]
    progress = LiveProgress("run", console=plain_console(), clock=clock)
    progress.on_train_begin(None, state_at(100, 200, log_history=earlier), None)
    clock.seconds = 10.0
    progress.on_step_end(None, state_at(110, 200), None)
    assert progress._history.best == (10, 0.9)
    assert len(progress._history.records) == 1
    assert progress._history.seconds_left == pytest.approx(90.0)


def test_a_validation_under_way_is_shown_until_its_loss_comes():
    progress = LiveProgress("run", console=plain_console())
    progress.on_train_begin(None, state_at(0), None)
    progress.on_prediction_step(None, state_at(0), None)
    assert "validating, batch 1" in drawn(progress._history)
    progress.on_log(None, state_at(0), None, logs={"eval_loss": 1.0})
    assert "validating" not in drawn(progress._history)


def test_the_best_validation_is_the_lowest_and_never_nan():
    history = History("run")
    for step, loss in ((1, math.nan), (2, 0.7), (3, 0.7), (4, 0.9)):
        history.add({"eval_loss": loss}, step)
    assert history.best == (2, 0.7)


@pytest.mark.parametrize("width", [30, 60, 100, 300])
@pytest.mark.parametrize("records", [[], [{"loss": math.nan}], [RECORD, RECORD]])
def test_the_picture_fits_any_terminal_and_any_record(records, width):
    history = History("运行", records=list(records), validations=[(1, math.inf)] if records else [])
    picture = drawn(history, width)
    assert (
        max(Console().measure(line).maximum if line else 0 for line in picture.splitlines())
        <= width
    )


def test_a_record_without_zones_or_weights_is_described_by_what_it_has():
    assert log_line({"loss": 2.0}, History("run", max_steps=5, step=1)) == "step 1/5  loss 2.0000"
    assert "easy" not in drawn(History("run", records=[{"loss": 2.0}]))


def test_a_sparkline_shows_the_whole_course():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(800)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, math.nan, 1, math.inf], 10) == "█▁"


@pytest.mark.parametrize(
    ("values", "width"), [([], 5), ([math.nan], 5), ([1.0, 2.0], 0), ([1], -3)]
)
def test_a_sparkline_of_nothing_is_empty(values, width):
    assert sparkline(values, width) == ""


def test_a_flat_sparkline_stays_flat():
    assert sparkline([2.0] * 4, 4) == "▁▁▁▁"


@pytest.mark.parametrize("width", [1, 7, 40, 41])
@pytest.mark.parametrize(
    "shares", [(0.41, 0.5, 0.09, 0.0), (1, 1, 1, 1), (0, 0, 0, 0.2), (0.333,) * 4]
)
def test_the_zones_fill_the_bar_exactly_and_in_proportion(shares, width):
    keys = ("zone_easy", "zone_learning", "zone_hard", "zone_refused")
    bar = zone_bar(dict(zip(keys, shares, strict=True)), width).plain
    assert len(bar) == width
    for glyph, share in zip("█▓▒░", shares, strict=True):
        assert abs(bar.count(glyph) - share / sum(shares) * width) <= 1


@pytest.mark.parametrize(
    "shares", [{}, {"zone_easy": 0.0}, {"zone_easy": math.nan}, {"zone_easy": None}]
)
def test_a_bar_without_shares_is_blank(shares):
    assert zone_bar(shares, 10).plain == " " * 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (151, "2:31"), (3751, "1:02:31"), (90_000, "25:00:00")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_drift_is_shown_and_a_run_that_only_forgets_is_told():
    history = History("run", max_steps=9, step=6)
    for step, (loss, drift) in enumerate([(1.0, 0.1), (0.9, 0.2), (0.95, 0.3)], start=1):
        history.add({"eval_loss": loss, "eval_drift": drift}, step)
        line = log_line({"eval_loss": loss, "eval_drift": drift}, history)
        assert f"drift {drift:.4f}" in line
        assert ("forgetting without learning" in line) == (step == 3)
