"""Better and worse answers as rows of a sort: what each target says against its row."""

# S = answers, N = targets of an answer

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from yrunner.data.dataset.examples import Column
from yrunner.recipe.schema.preference import BradleyTerryLoss, DpoLoss
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.order import MARGIN
from yrunner.scoring.suspicious_spans import bounded_loss


def sorted_by_margin(recipe: Recipe) -> Recipe:
    """The recipe with the only score of pairs, and with a loss by which language models learn them.

    A reward model gives no token a probability, so the models of a cross-fit learn by DPO instead.
    """
    changes: dict[str, object] = {
        "sort": recipe.sort.model_copy(update={"score": MARGIN, "also": []})
    }
    if isinstance(recipe.loss, BradleyTerryLoss):
        changes["loss"] = DpoLoss(kind="dpo")
        changes["train"] = recipe.train.model_copy(update={"stage": "preference"})
    return recipe.model_copy(update=changes)


def against_by_base(ratings_S: Column, base: Sequence[TokenScores], *, alone: bool) -> list[Tensor]:
    """How much each target speaks against its row in nats, by the base; see `_against`.

    Log-probabilities per target are compared, or the shorter answer would always win.
    """
    values = [-bounded_loss(one.loss_N) / max(len(one.loss_N), 1) for one in base]
    return _against(ratings_S, values, alone=alone)


def against_by_tuned(
    ratings_S: Column, base: Sequence[TokenScores], tuned: Sequence[TokenScores], *, alone: bool
) -> list[Tensor]:
    """The same by how much more likely each target is under a tuned model than under the base."""
    values = [
        bounded_loss(before.loss_N) - bounded_loss(after.loss_N)
        for before, after in zip(base, tuned, strict=True)
    ]
    return _against(ratings_S, values, alone=alone)


def _against(ratings_S: Column, values: Sequence[Tensor], *, alone: bool) -> list[Tensor]:
    """Summed over a row it is minus the margin: the better answer's value minus the other's.

    `ratings_S`: 1 for a better or good answer, -1 for the other. `alone`: answers may be without
    a counterpart; their values are then compared with the middle between good and bad ones.
    """
    signs = ratings_S.tolist()
    middle = _middle(signs, values) if alone else 0.0
    return [
        -sign * (value_N - middle / max(len(value_N), 1))
        for sign, value_N in zip(signs, values, strict=True)
    ]


def _middle(signs: Sequence[int], values: Sequence[Tensor]) -> float:
    """Between the mean value of good answers and that of bad ones."""
    sums: dict[int, list[float]] = {}
    for sign, value_N in zip(signs, values, strict=True):
        sums.setdefault(sign, []).append(float(value_N.sum()))
    return fmean(map(fmean, sums.values()))
