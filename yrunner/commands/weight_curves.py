"""The picture of a kind of loss: its weight over the loss of a target, above the losses found."""

# N = points of a curve

from collections.abc import Sequence
from typing import assert_never

import torch

from yrunner.losses.nlirg import EASY_UP_TO, LEARNING_UP_TO
from yrunner.recipe.schema import DftLoss, EaftLoss, Loss, NlirgEntropyLoss, NlirgLoss, PlainLoss
from yrunner.reports import plots
from yrunner.training.arguments import token_weight

HIGHEST_LOSS = 16.0
NUM_POINTS = 801


def shown_entropies(loss: Loss) -> dict[str, float]:
    """The names of a kind's curves, and the entropy in nats that each is drawn at.

    One curve, at any entropy, where the weight depends on the loss alone.
    """
    match loss:
        case PlainLoss() | NlirgLoss() | DftLoss():
            return {"any entropy": 0.0}
        case NlirgEntropyLoss():
            return {f"entropy {nats} nats": float(nats) for nats in (0, 1, 3)}
        case EaftLoss():
            return {f"entropy {nats} nats of the top 20": nats for nats in (0.5, 1.5, 2.9)}
        case _:
            assert_never(loss)


def zone_edges(loss: Loss) -> tuple[float, float, float]:
    """The losses between the four zones; a low `loss_deadline` leaves no room for zones below."""
    loss_deadline = token_weight(loss)[1]
    return min(EASY_UP_TO, loss_deadline), min(LEARNING_UP_TO, loss_deadline), loss_deadline


def weight_plot(loss: Loss, *, before: Sequence[float] = (), after: Sequence[float] = ()) -> str:
    """The curves as SVG; `before` and `after` are losses of targets around the training."""
    weight, _ = token_weight(loss)
    losses_N = torch.linspace(0, HIGHEST_LOSS, NUM_POINTS)
    curves = {
        name: weight.of(losses_N, torch.full_like(losses_N, entropy)).tolist()
        for name, entropy in shown_entropies(loss).items()
    }
    return plots.weight_curve(
        losses_N.tolist(), curves, zone_edges=zone_edges(loss), before=before, after=after
    )
