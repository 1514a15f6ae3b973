"""Chunks of the fused head: of equal size, in memory that is used again."""

import pytest
import torch
from torch import nn

from yrunner.losses.chunked_loss import even_rows, linear_targets
from yrunner.losses.head_call import Space
from yrunner.losses.targets import PLAIN
from yrunner.losses.vocab_sweep import LogitForm


@pytest.mark.parametrize(
    "num_targets, rows, expected", [(0, 4, 4), (3, 4, 3), (5, 4, 3), (8, 4, 4)]
)
def test_chunks_are_as_few_and_as_even_as_they_can_be(num_targets, rows, expected):
    assert even_rows(num_targets, rows) == expected


def test_memory_that_is_used_again_changes_no_batch():
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    head.weight.requires_grad_(False)
    space = Space()
    for num_targets in (3, 40, 7, 0, 40):
        hidden_ND = torch.randn(num_targets, 8)
        labels_N = torch.randint(50, (num_targets,))
        found = []
        for kept in (space, None):
            inputs_ND = hidden_ND.clone().requires_grad_()
            targets = linear_targets(
                inputs_ND, head, labels_N, PLAIN, LogitForm(), rows=16, space=kept
            )
            targets.weighted.backward()
            found.append((targets.loss_N, targets.entropy_N, inputs_ND.grad))
        for once_more, fresh in zip(*found, strict=True):
            assert torch.equal(once_more, fresh)


def test_memory_is_taken_once_for_batches_that_fit():
    space, like = Space(), torch.empty(0)
    first = space.take("logits", like, (4, 10), torch.float32)
    assert space.take("logits", like, (2, 10), torch.float32).data_ptr() == first.data_ptr()
    assert space.take("pulls", like, (2, 10), torch.float32).data_ptr() != first.data_ptr()
    assert space.take("logits", like, (5, 10), torch.float32).shape == (5, 10)
    assert space.take("logits", like, (4, 10), torch.float64).dtype == torch.float64
