"""Traffic grows with what ZeRO shards, and hardly with the number of GPUs."""

from dataclasses import replace

import pytest

from benchmarks.scaling.traffic_formula import traffic_per_gpu
from tests.training.memory.test_zero import COUNTS, HALF
from yrunner.training.memory.zero import FLOAT32, Sharing

TRAINED = 2 * COUNTS.trained
"""Bytes in bfloat16."""


def test_one_gpu_sends_nothing():
    assert traffic_per_gpu(HALF, Sharing()).total == 0


def test_each_of_two_gpus_sends_half_as_much_as_each_of_very_many():
    two, many = (traffic_per_gpu(HALF, Sharing(gpus)).total for gpus in (2, 10**6))
    assert two == FLOAT32 * COUNTS.trained
    assert many == pytest.approx(2 * two, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "micro_steps", "expected"),
    [
        (1, 1, 2 * TRAINED + TRAINED),
        (1, 4, 2 * TRAINED + TRAINED),
        (2, 4, 4 * 2 * TRAINED + TRAINED),
        (3, 4, 4 * (TRAINED + 2 * 2 * COUNTS.total)),
    ],
)
def test_every_stage_sends_what_it_shards(stage: int, micro_steps: int, expected: int):
    sent = traffic_per_gpu(HALF, Sharing(10**9, stage), micro_steps=micro_steps)
    assert sent.total == pytest.approx(expected, rel=1e-6)


def test_stage_3_gathers_the_weights_of_a_small_model_once():
    small = replace(HALF, counts=replace(COUNTS, trained=10**8, frozen=0))
    assert traffic_per_gpu(small, Sharing(2, 3)).weights == 2 * 10**8 // 2
