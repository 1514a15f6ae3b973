"""Chunks of the fused head: even sizes, reused buffers."""

import pytest
import torch
from torch import nn

from yrunner.losses.chunked_loss import BufferPool, linear_targets
from yrunner.losses.head_call import even_rows
from yrunner.losses.targets import PLAIN
from yrunner.losses.vocab_sweep import LogitForm


@pytest.mark.parametrize(
    "num_targets, rows, expected", [(0, 4, 4), (3, 4, 3), (5, 4, 3), (8, 4, 4)]
)
def test_chunks_are_as_few_and_as_even_as_they_can_be(num_targets, rows, expected):
    assert even_rows(num_targets, rows) == expected


def test_reused_buffers_change_no_result():
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    head.weight.requires_grad_(False)
    pool = BufferPool()
    for num_targets in (3, 40, 7, 0, 40):
        hidden_ND = torch.randn(num_targets, 8)
        labels_N = torch.randint(50, (num_targets,))
        found = []
        for reused in (pool, None):
            inputs_ND = hidden_ND.clone().requires_grad_()
            targets = linear_targets(
                inputs_ND, head, labels_N, PLAIN, LogitForm(), rows=16, pool=reused
            )
            targets.weighted.backward()
            found.append((targets.loss_N, targets.entropy_N, inputs_ND.grad))
        for again, fresh in zip(*found, strict=True):
            assert torch.equal(again, fresh)


def test_a_buffer_is_reused_when_it_is_large_enough():
    pool, like = BufferPool(), torch.empty(0)
    first = pool.take("logits", like, (4, 10), torch.float32)
    assert pool.take("logits", like, (2, 10), torch.float32).data_ptr() == first.data_ptr()
    assert pool.take("gradients", like, (2, 10), torch.float32).data_ptr() != first.data_ptr()
    assert pool.take("logits", like, (5, 10), torch.float32).shape == (5, 10)
    assert pool.take("logits", like, (4, 10), torch.float64).dtype == torch.float64
