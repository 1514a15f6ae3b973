"""What the guard says of an update, and that the optimizer has not moved where it says no."""

import math

import pytest
import torch

from tests.training.conftest import checkpoint_every, weights_of
from yrunner.losses.nlirg import ZONES
from yrunner.recipe.schema.recipe import Spikes
from yrunner.training.spike_guard import WEIGHTLESS, Exploded, SpikeGuard, spread

FINE = 0.5
"""A gradient norm that nobody minds."""


def sums(loss=2.0, weight=1.0, targets=10):
    """The sums of an update of so many targets, as `sum_targets` has them."""
    zones = [targets, 0, 0, 0] if weight else [0, 0, 0, targets]
    zeros = [0.0] * len(ZONES)
    return [
        loss * targets,
        loss * weight * targets,
        weight * targets,
        0,
        0,
        0,
        *zones,
        *zeros,
        targets,
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused(loss):
    guard = SpikeGuard(Spikes())
    with pytest.raises(
        Exploded, match=rf"update 3: the loss is {loss}; the optimizer step was not"
    ):
        guard.judge(3, sums(loss), FINE)
    with pytest.raises(Exploded, match="the norm of the gradient is inf"):
        guard.judge(4, sums(), math.inf)
    guard.judge(5, sums(), None)
    guard.judge(6, [*sums(math.nan)[:-1], 0], FINE)  # an update without targets has no loss


def test_a_spike_is_told_once_in_a_window_or_stops_where_that_is_asked_for(capfd):
    steady = [2.0 + 0.1 * (-1) ** update for update in range(20)]
    guard = SpikeGuard(Spikes(window=20))
    for update, loss in enumerate([*steady, 2.3, 9.0, 9.5]):
        guard.judge(update, sums(loss), FINE)
    err = capfd.readouterr().err
    assert err.count("warning") == 1
    assert "update 21: the loss jumps to 9; in the 20 updates before it was 2 ± 0.15" in err
    guard = SpikeGuard(Spikes(window=20, action="stop"))
    for loss in steady:
        guard.judge(0, sums(loss), FINE)
    with pytest.raises(Exploded, match=r"jumps to 9.*train\.spikes"):
        guard.judge(21, sums(9.0), FINE)
    guard = SpikeGuard(Spikes(window=20, action="ignore"))
    for loss in [*steady, 99.0]:
        guard.judge(0, sums(loss), FINE)
    assert not capfd.readouterr().err


def test_near_a_loss_of_zero_a_hard_row_is_no_spike(capfd):
    guard = SpikeGuard(Spikes(window=20))
    for update, loss in enumerate([*[0.005] * 20, 0.079, 0.25]):
        guard.judge(update, sums(loss), FINE)
    assert not capfd.readouterr().err
    guard.judge(22, sums(0.26), FINE)
    assert "the loss jumps to 0.26" in capfd.readouterr().err


def test_the_spread_of_a_normal_sample_is_its_deviation_and_outliers_do_not_move_it():
    sample = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 5
    middle, deviation = spread([*sample.tolist(), *[1e9] * 50])
    assert middle == pytest.approx(5, abs=0.05)
    assert deviation == pytest.approx(1, abs=0.05)


def test_updates_without_any_weight_are_told_with_the_shares_of_the_zones(capfd):
    guard = SpikeGuard(Spikes())
    for update in range(2 * WEIGHTLESS):
        guard.judge(update, sums(20.0, weight=0.0), FINE)
    err = capfd.readouterr().err
    assert err.count("nothing was learned in 5 updates, every target has weight 0") == 1
    assert "(easy 0%, learning 0%, hard 0%, refused 100%)" in err


@pytest.mark.parametrize("loss", ["plain", "nlirg"])
def test_an_update_with_a_nan_moves_nothing_and_the_state_before_it_resumes(
    make_model, examples, make_trainer, loss
):
    """NaN in every hidden state of an update, which NLIRG alone would refuse without a word."""

    def run(folder, poison=False):
        model = make_model()
        trainer = make_trainer(
            model,
            examples[:24],
            loss=loss,
            folder=folder,
            batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            checkpoint=checkpoint_every(2),
        )

        def spoil(module, inputs, output):
            return output * math.nan if poison and trainer.state.global_step == 4 else output

        model.model.norm.register_forward_hook(spoil)
        return model, trainer

    undisturbed, trainer = run("undisturbed")
    trainer.train()
    _, poisoned = run("poisoned", poison=True)
    with pytest.raises(Exploded, match=r"update 5: the (weighted )?loss is nan"):
        poisoned.train()
    poisoned.save()
    assert poisoned.run_dir.saved_steps()[-1] == 4
    resumed, again = run("poisoned")
    again.train(again.run_dir.checkpoint(4))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
