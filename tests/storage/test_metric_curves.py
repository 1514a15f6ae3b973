"""Curves of a file that grows: nothing lost, nothing twice, and few points of many records."""

import json
import os
from pathlib import Path

import pytest

from yrunner.storage.metric_curves import (
    MOST_POINTS,
    GrowingMetrics,
    MetricCurve,
    last_records,
    sampled_losses,
)


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path.resolve() / "metrics.jsonl"


@pytest.mark.parametrize("number", [1, MOST_POINTS - 1, MOST_POINTS, 5 * MOST_POINTS + 7])
def test_points_are_the_means_of_equally_many_neighbours(number: int):
    curve = MetricCurve()
    values = [float(step % 7) for step in range(1, number + 1)]
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    size = curve.records_per_point
    whole = number // size
    slow = [sum(values[i * size : (i + 1) * size]) / size for i in range(whole)]
    assert curve.values == pytest.approx(slow)
    assert curve.steps == [size * (i + 1) for i in range(whole)]
    assert len(curve.values) < MOST_POINTS
    assert whole > MOST_POINTS // 2 - 1 or size == 1


def test_what_is_appended_is_read_once_and_a_half_line_when_it_is_whole(path: Path):
    metrics = GrowingMetrics(path, path.parent)
    assert metrics.read_more() == (False, [])
    path.write_text(lines({"step": 1, "loss": 3.0}) + '{"step": 2, "lo')
    assert metrics.read_more() == (True, [{"step": 1, "loss": 3.0}])
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert metrics.read_more() == (False, [{"step": 2, "loss": 2.0}])
    assert metrics.read_more() == (False, [])
    assert metrics.as_json() == {"loss": {"steps": [1, 2], "values": [3.0, 2.0]}}


def test_a_resumed_run_replaces_its_file_and_the_curves_begin_anew(path: Path, tmp_path: Path):
    path.write_text(lines(*({"step": step, "loss": 1.0} for step in (1, 2, 3))))
    metrics = GrowingMetrics(path, path.parent)
    metrics.read_more()
    other = tmp_path / "new"
    other.write_text(lines({"step": 1, "loss": 1.0}))
    os.replace(other, path)
    is_new, _ = metrics.read_more()
    assert is_new and metrics.as_json()["loss"]["steps"] == [1]
    path.unlink()
    assert metrics.read_more() == (True, [])
    assert metrics.as_json() == {}


@pytest.mark.parametrize(
    "damage",
    ["not json\n", "[1]\n", '{"loss": 1.0}\n', "\n", '{"step": 2, "loss": "high"}\n', "\x00\n"],
)
def test_damaged_lines_are_passed_over(path: Path, damage: str):
    path.write_text(lines({"step": 1, "loss": 3.0}) + damage + lines({"step": 3, "loss": 1.0}))
    metrics = GrowingMetrics(path, path.parent)
    metrics.read_more()
    assert metrics.as_json()["loss"] == {"steps": [1, 3], "values": [3.0, 1.0]}


def test_what_is_not_finite_leaves_a_gap(path: Path):
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity, "entropy": 1}\n')
    metrics = GrowingMetrics(path, path.parent)
    metrics.read_more()
    assert metrics.as_json()["entropy"] == {"steps": [2], "values": [1.0]}
    assert metrics.as_json()["loss"]["values"] == []


def test_the_end_of_a_long_file_has_its_last_records_and_the_last_validation(path: Path):
    records = [{"step": step, "loss": 1 / step, "filler": 1.5} for step in range(1, 5001)]
    records.insert(4900, {"step": 4900, "eval_loss": 0.25})
    path.write_text(lines(*records))
    with path.open("rb") as file:
        found = last_records(file)
    assert found[-1] == records[-1]
    assert [record["eval_loss"] for record in found if "eval_loss" in record] == [0.25]


@pytest.mark.parametrize("number", [0, 1, 2, 10, 3000])
def test_sampled_losses_keep_their_order_and_are_of_the_whole_file(path: Path, number: int):
    path.write_text(lines(*({"step": step, "loss": 1e-05 * step} for step in range(1, number + 1))))
    with path.open("rb") as file:
        values = sampled_losses(file, 20)
    assert values == sorted(set(values))
    assert len(values) == min(20, number) or number == 10
    if number:
        assert values[0] == 1e-05
        assert values[-1] >= 0.9 * 1e-05 * number or number <= 10
