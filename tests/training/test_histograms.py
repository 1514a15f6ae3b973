"""Histograms of the targets, against numpy over all of them; and TensorBoard's files read back."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from tests.training.conftest import LOSSES, checkpoint_every
from yrunner.losses.targets import PLAIN, Targets, TokenWeight
from yrunner.training import trackers
from yrunner.training.arguments import token_weight
from yrunner.training.histograms import BINS, FIGURES, TargetHistograms, highest_weight
from yrunner.training.metrics import read_metrics
from yrunner.training.trackers import tracker_callbacks


def targets_of(loss_N, entropy_N, weight_N, gradient_N):
    return Targets(loss_N.sum(), loss_N, entropy_N, weight_N, torch.ones_like(loss_N), gradient_N)


def random_targets(seed, number):
    figures_FN = torch.rand(4, number, generator=torch.Generator().manual_seed(seed))
    return targets_of(*(figures_FN * torch.tensor([20.0, 12.0, 1.0, 1.4])[:, None]))


def figures_of(micro_batches):
    """All values of each figure, one micro-batch after the other, by name."""
    columns = {"loss": "loss_N", "entropy": "entropy_N"}
    columns |= {"weight": "weight_N", "gradient": "gradient_N"}
    return {
        name: np.concatenate([vars(targets)[column].double().numpy() for targets in micro_batches])
        for name, column in columns.items()
    }


def assert_equal(histogram, values):
    """The parts of a histogram are those of all the values that are numbers."""
    values = values[np.isfinite(values)]
    borders = np.array([0.0, *histogram.bucket_limits[:-1], np.inf])
    slow_counts = [
        int(((values >= low) & (values < high)).sum()) for low, high in pairwise(borders)
    ]
    assert list(histogram.bucket_counts) == slow_counts
    assert histogram.num == len(values)
    parts = (histogram.min, histogram.max, histogram.sum, histogram.sum_squares)
    expected = (values.min(), values.max(), values.sum(), np.square(values).sum())
    assert parts == pytest.approx(expected)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), st.integers(0, 2**31))
def test_the_histograms_are_those_of_all_targets_however_they_came(sizes, seed):
    batches = [random_targets(seed + place, size) for place, size in enumerate(sizes)]
    histograms = TargetHistograms(PLAIN)
    for targets in batches:
        histograms.add(targets)
    drained = histograms.drain()
    assert tuple(drained) == FIGURES
    for name, values in figures_of(batches).items():
        assert_equal(drained[name], values)


def test_a_value_on_a_border_belongs_to_the_bin_above_it():
    edge_N = torch.tensor([0.0, 0.25, 0.5, 15.75, 16.0, 1e30])
    histograms = TargetHistograms(PLAIN)
    histograms.add(targets_of(edge_N, edge_N, torch.ones(6), torch.ones(6)))
    drained = histograms.drain()
    counts = drained["loss"].bucket_counts
    assert [counts[place] for place in (0, 1, 2, BINS - 1, BINS)] == [1, 1, 1, 1, 2]
    assert drained["weight"].bucket_counts[BINS // 2] == 6


def test_what_is_not_a_number_is_in_no_histogram():
    loss_N = torch.tensor([1.0, math.nan, math.inf])
    histograms = TargetHistograms(PLAIN)
    histograms.add(targets_of(loss_N, torch.full((3,), math.nan), torch.ones(3), -loss_N))
    drained = histograms.drain()
    assert set(drained) == {"loss", "weight", "gradient"}
    assert (drained["loss"].num, drained["loss"].max, drained["loss"].sum) == (1, 1.0, 1.0)


def test_counting_begins_anew_after_each_log_and_nothing_counted_is_nothing_written():
    histograms = TargetHistograms(PLAIN)
    assert histograms.drain() == {}
    histograms.add(random_targets(0, 7))
    assert histograms.drain()["loss"].num == 7
    assert histograms.drain() == {}
    histograms.add(random_targets(1, 0))
    assert histograms.drain() == {}


def test_counting_never_waits_for_the_values():
    """Tensors without values can be counted: nothing is read before the log."""
    histograms = TargetHistograms(PLAIN)
    for _ in range(2):
        histograms.add(targets_of(*torch.rand(4, 9, device="meta")))
    with pytest.raises(NotImplementedError):
        histograms.drain()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_bins_hold_every_weight_of_every_kind_and_its_gradient(loss):
    weight, _ = token_weight(LOSSES[loss])
    top = BINS * TargetHistograms(weight).widths[FIGURES.index("gradient")]
    assert math.sqrt(2) * highest_weight(weight) <= top <= 4


@pytest.mark.parametrize(("height", "top"), [(0.3, 0.5), (1.0, 2.0), (5.0, 8.0), (0.0, 2.0)])
def test_the_bins_of_the_weights_follow_the_height_of_the_curve(height, top):
    weight = TokenWeight(lambda loss_N, _: torch.full_like(loss_N, height))
    assert BINS * TargetHistograms(weight).widths[FIGURES.index("weight")] == top


@pytest.mark.parametrize("loss", ["nlirg", "eaft"])
def test_tensorboard_shows_the_histograms_of_all_targets_since_the_last_record(
    make_model, examples, make_trainer, loss
):
    trainer = make_trainer(
        make_model(),
        examples[8:24],
        examples[:8],
        loss=loss,
        batch_size=2,
        gradient_accumulation_steps=2,
        log_every=3,
        trackers=["tensorboard"],
    )
    shown = []
    add = trainer.objective.histograms.add
    trainer.objective.histograms.add = lambda targets: (add(targets), shown.append(targets))
    trainer.train()
    events = read_events(trainer)
    records = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert [row["step"] for row in records] == [3, 4]
    for name in FIGURES:
        logged = events.Histograms(f"train/{name}_histogram")
        assert [event.step for event in logged] == [3, 4]
        for event, batches in zip(logged, (shown[:6], shown[6:]), strict=True):
            assert_equal_read(event.histogram_value, figures_of(batches)[name])


def assert_equal_read(read, values):
    borders = np.array([0.0, *read.bucket_limit[:-1], np.inf])
    assert read.bucket == np.histogram(values, borders)[0].tolist()
    assert (read.min, read.max) == pytest.approx((values.min(), values.max()))
    assert (read.num, read.sum) == pytest.approx((len(values), values.sum()))


def read_events(trainer):
    events = EventAccumulator(str(trainer.run_dir.trackers), {"histograms": 0})
    events.Reload()
    return events


def test_a_resumed_run_goes_on_where_its_checkpoint_was_written(make_model, examples, make_trainer):
    """What the run had logged after the checkpoint is hidden, as it is gone from metrics.jsonl."""
    keys = dict(batch_size=4, checkpoint=checkpoint_every(2), trackers=["tensorboard"])
    stopped = make_trainer(make_model(), examples[:24], **keys)
    stopped.callbacks.append(KilledAfter(3))
    with pytest.raises(Killed):
        stopped.train()
    again = make_trainer(make_model(), examples[:24], **keys)
    again.train(again.run_dir.checkpoint(2))
    events = read_events(again)
    for logged in (events.Scalars("train/loss"), events.Histograms("train/loss_histogram")):
        assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]


class Killed(Exception):
    """In the place of a signal that cannot be caught."""


class KilledAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise Killed


def test_after_training_nothing_more_is_written(make_model, examples, make_trainer):
    """Left to itself, transformers would open a folder of its own for a late validation."""
    trainer = make_trainer(make_model(), examples[4:8], examples[:4], trackers=["tensorboard"])
    trainer.train()
    files = sorted(trainer.run_dir.folder.rglob("*tfevents*"))
    trainer.validate()
    assert sorted(trainer.run_dir.folder.rglob("*tfevents*")) == files
    assert {file.parent for file in files} == {trainer.run_dir.trackers}


def test_without_tensorboard_nothing_is_counted(tmp_path, monkeypatch):
    assert tracker_callbacks([], tmp_path, PLAIN) == []
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [dict])
    assert tracker_callbacks(["wandb"], tmp_path, PLAIN) == [{}], "that of the library alone"
