"""Bytes are counted while a tensor lives, whatever it is used for."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from yrunner.training.memory.trace import REAL_UP_TO, LiveBytes

KILO = 1024


@pytest.fixture
def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)


@pytest.fixture
def weight(fake_mode: FakeTensorMode) -> torch.Tensor:
    """A kilobyte: 256 numbers in float32."""
    with fake_mode:
        return torch.empty(16, 16)


def test_a_tensor_counts_from_its_birth_to_its_death(fake_mode, weight):
    live = LiveBytes(fake_mode)
    live.assign([weight], "weights")
    with live:
        doubled = weight * 2
        assert live.alive == {"weights": KILO, "activations": KILO}
        del doubled
        assert live.alive == {"weights": KILO, "activations": 0}


def test_a_view_and_a_change_in_place_cost_nothing(fake_mode, weight):
    live = LiveBytes(fake_mode)
    live.assign([weight], "weights")
    with live:
        view = weight.view(256)[:8]
        view.add_(1)
    assert live.alive["activations"] == 0


def test_the_peak_is_kept_for_every_amount_of_gradients(fake_mode, weight):
    live = LiveBytes(fake_mode)
    live.assign([weight], "weights")
    with live:
        kept = weight + 1
        torch.cat([kept, kept])  # gone at once, and the peak
        live.assign([kept], "gradients")
        weight + 1
    assert live.take_peaks() == [(0, 3 * KILO), (KILO, KILO)]
    assert live.take_peaks() == []


def test_a_copy_of_a_weight_in_another_dtype_is_told_apart(fake_mode, weight):
    live = LiveBytes(fake_mode)
    live.assign([weight], "weights")
    with live:
        half = weight.bfloat16()
        copy_of_a_copy = half.float()
    assert live.alive["copies"] == KILO // 2
    assert live.alive["activations"] == copy_of_a_copy.nbytes
    assert live.peaks_without_copies() == [(0, KILO)]
    assert live.take_peaks() == [(0, KILO + KILO // 2)]


def test_small_tensors_beside_the_model_keep_their_values(fake_mode):
    with LiveBytes(fake_mode):
        positions = torch.arange(5)
        assert positions.max().item() == 4
        assert (positions > 2).nonzero().squeeze(1).tolist() == [3, 4]


def test_large_tensors_beside_the_model_have_no_values(fake_mode):
    with LiveBytes(fake_mode) as live:
        column = torch.ones(REAL_UP_TO)
        table = column[:, None] * column
    assert not isinstance(column, FakeTensor)
    assert isinstance(table, FakeTensor)
    assert live.alive["activations"] == 4 * REAL_UP_TO * (REAL_UP_TO + 1)


def test_a_real_mask_picks_as_many_values_as_it_would(fake_mode, weight):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    with LiveBytes(fake_mode):
        picked = weight[mask]
        rows = weight[mask[:, 0]]
    assert picked.shape == (mask.sum(),)
    assert rows.shape == (mask[:, 0].sum(), 16)


def test_operations_that_fake_tensors_refuse_have_stand_ins(fake_mode, weight):
    with fake_mode:
        experts = torch.empty(4, 16, 8)
        ends = torch.empty(4, dtype=torch.int32)
    with LiveBytes(fake_mode):
        product = torch._grouped_mm(weight, experts, offs=ends)
        norm = torch.ops.aten.norm.Scalar(weight, 2)
    assert product.shape == (16, 8)
    assert product.dtype == torch.float32
    assert norm.shape == ()
