"""What each of many GPUs holds, against the arithmetic done by hand for round numbers."""

from dataclasses import replace

import pytest

from yrunner.models.size import WeightCounts
from yrunner.training.memory.trace import StepTrace
from yrunner.training.memory.zero import (
    LIVE_NUMBERS,
    GpuMemory,
    Sharing,
    Workload,
    memory_per_gpu,
    sharings_for,
)

MILLIARD = 10**9
COUNTS = WeightCounts(
    trained=2 * MILLIARD,
    frozen=6 * MILLIARD,
    trained_in_layers=2 * MILLIARD,
    frozen_in_layers=4 * MILLIARD,
    head=MILLIARD,
    largest=MILLIARD,
    largest_in_layers=MILLIARD // 10,
)
TRACE = StepTrace(
    weights=4 * COUNTS.trained + 2 * COUNTS.frozen,
    optimizer=8 * COUNTS.trained,
    while_computing=((0, 30 * MILLIARD), (4 * COUNTS.trained, 20 * MILLIARD)),
    while_updating=((4 * COUNTS.trained, 8 * MILLIARD),),
    # Autocast's copies of 2 milliard numbers are gone before the last gradients are there.
    without_copies=((0, 26 * MILLIARD), (4 * COUNTS.trained, 20 * MILLIARD)),
)
BUCKET = 10**7
HALF = Workload(TRACE, COUNTS, bytes_per_number=2, bucket_numbers=BUCKET)
SENT = 2 * BUCKET * 2
"""Bytes of two buckets in bfloat16."""


def test_alone_all_is_held_and_the_busiest_moment_counts():
    need = memory_per_gpu(HALF, Sharing())
    assert need == GpuMemory(20 * MILLIARD, 0, 16 * MILLIARD, 30 * MILLIARD, buffers=0)
    assert need.peak == TRACE.peak == 66 * MILLIARD


def test_between_several_gpus_the_gradients_are_there_twice():
    need = memory_per_gpu(HALF, Sharing(gpus=8))
    assert need.buffers == 4 * COUNTS.trained
    assert need.peak == TRACE.peak + need.buffers


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (1, GpuMemory(16 * MILLIARD, 0, 3 * MILLIARD, 26 * MILLIARD, SENT)),
        (2, GpuMemory(16 * MILLIARD, 0, 3 * MILLIARD, 26 * MILLIARD, SENT)),
        (3, GpuMemory(2 * MILLIARD, 0, 3 * MILLIARD, 26 * MILLIARD, 2 * LIVE_NUMBERS + SENT)),
    ],
)
def test_each_stage_shares_out_more(stage: int, expected: GpuMemory):
    assert memory_per_gpu(HALF, Sharing(8, stage)) == expected


def test_stage_2_shares_out_the_gradients_and_stage_1_does_not():
    moment = (4 * COUNTS.trained, 50 * MILLIARD)
    late = replace(HALF, update=replace(TRACE, without_copies=(moment,)))
    needs = [memory_per_gpu(late, Sharing(8, stage)) for stage in (1, 2)]
    assert [need.gradients for need in needs] == [4 * MILLIARD, MILLIARD // 2]


def test_the_work_of_the_step_is_shared_out_with_the_state():
    heavy = replace(HALF, update=replace(TRACE, while_updating=((0, 80 * MILLIARD),)))
    assert memory_per_gpu(heavy, Sharing()).activations == 80 * MILLIARD
    shared = memory_per_gpu(heavy, Sharing(2, stage=1))
    assert shared.activations == (80 * MILLIARD + 4 * COUNTS.trained) // 2


def test_offloading_moves_the_optimizer_and_under_stage_3_the_weights_to_the_machine():
    second = memory_per_gpu(HALF, Sharing(8, 2, offload=True))
    # A float32 copy, two moments and the gradient, of the part that is one's own.
    assert (second.optimizer, second.host) == (0, 16 * COUNTS.trained // 8)
    third = memory_per_gpu(HALF, Sharing(8, 3, offload=True))
    assert (third.weights, third.host) == (0, second.host + 2 * COUNTS.total // 8)


def test_quantized_weights_are_small_and_one_of_them_is_restored_at_a_time():
    lora, qlora = (memory_per_gpu(replace(HALF, stored=it), Sharing()) for it in (None, 0.5))
    saved = 1.5 * COUNTS.frozen_in_layers
    assert lora.weights - qlora.weights == pytest.approx(saved)
    assert qlora.activations - lora.activations == 2 * COUNTS.largest_in_layers


def test_an_optimizer_of_8_bits_remembers_a_quarter():
    eight_bits = memory_per_gpu(replace(HALF, remembered=0.25), Sharing())
    assert eight_bits.optimizer == TRACE.optimizer // 4


def test_one_gpu_has_nobody_to_share_with_but_the_machine():
    assert [str(layout) for layout in sharings_for(1)] == [
        "alone",
        "ZeRO 2, offload",
        "ZeRO 3, offload",
    ]
    assert "ZeRO 3" in map(str, sharings_for(8))
