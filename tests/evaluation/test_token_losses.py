"""The loss of every target of some examples, against one example at a time."""

import pytest

from tests.training.test_trainer import losses_one_by_one
from yrunner.evaluation.token_losses import measure_token_losses


@pytest.mark.parametrize("batch_size", [1, 5])
def test_losses_are_those_of_each_target_in_order(make_model, examples, batch_size):
    model = make_model()
    losses = measure_token_losses(model, examples[:7], pad_token_id=0, batch_size=batch_size)
    assert sorted(losses) == pytest.approx(sorted(losses_one_by_one(model, examples[:7]).tolist()))
    assert len(losses) == sum(len(example.target_positions) for example in examples[:7])
