"""What a model makes of the answers of a micro-batch, what they cost, and the figures to log."""

# Shapes: S = answers of a micro-batch, N = their targets, P = pairs, R = entries of a record

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from torch import Tensor

from yrunner.data.batching.answers import OTHER, model_inputs
from yrunner.data.batching.batches import Batch
from yrunner.losses.log_probs import measure_log_probs
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.preference import dpo_loss, kto_loss, orpo_loss, simpo_loss
from yrunner.losses.targets import weigh
from yrunner.losses.token_weights import dft_weight, nlirg_entropy_weight
from yrunner.recipe.schema.preference import DpoLoss, KtoLoss, OrpoLoss, SimpoLoss
from yrunner.recipe.schema.recipe import Loss, PreferenceLoss
from yrunner.scoring.base_predictions import adapter_off
from yrunner.training.metrics import Figures

CURVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nlirg": lambda loss_N, _: nlirg_weight(loss_N),
    "nlirg_entropy": nlirg_entropy_weight,
    "dft": lambda loss_N, _: dft_weight(loss_N),
}
"""Of `loss.weigh`: from loss and entropy under the reference, in nats, to the weight of a token."""
TINY = 1e-12
"""In place of a sum of weights that is 0."""


def compares_with_reference(loss: Loss) -> bool:
    """Whether a loss compares the model with the one that the run began with."""
    return isinstance(loss, DpoLoss | KtoLoss)


@dataclass(frozen=True)
class AnswerLogProbs:
    """The answers of a micro-batch; those of a pair are neighbours, the better one first."""

    log_prob_S: Tensor
    """Sum over the targets of an answer in nats, float64; differentiable."""
    num_targets_S: Tensor
    is_desirable_S: Tensor
    """True for the better one of a pair, or one marked as good."""
    entropy: Tensor
    """Sum over all targets."""
    reference_S: Tensor | None = None
    """`weighed_S` of the reference; None for a loss without one."""
    weights_S: tuple[Tensor, Tensor] | None = None
    """With `loss.weigh`: log-probabilities times weights, summed, and the sum of the weights."""

    @property
    def weighed_S(self) -> Tensor:
        """What is compared with the reference: `log_prob_S`, if tokens are not weighed."""
        return self.log_prob_S if self.weights_S is None else self.weights_S[0]

    @property
    def size_S(self) -> Tensor:
        """What a mean per token divides by: targets, or the sum of their weights."""
        return self.num_targets_S if self.weights_S is None else self.weights_S[1].clamp(min=TINY)

    @property
    def mean_S(self) -> Tensor:
        """Log-probability per target."""
        return self.log_prob_S / self.num_targets_S

    @property
    def ratio_S(self) -> Tensor:
        """Log-probability minus the reference's."""
        assert self.reference_S is not None, "this loss has no reference"
        return self.weighed_S - self.reference_S

    def detached(self) -> "AnswerLogProbs":
        """The same values without gradient."""
        weights = self.weights_S and (self.weights_S[0].detach(), self.weights_S[1])
        return replace(self, log_prob_S=self.log_prob_S.detach(), weights_S=weights)


def log_probs_of_answers(called: Any, batch: Batch, prefix: str = "") -> tuple[Tensor, Tensor]:
    """The summed log-probability of each answer, float64, and the entropy over all targets."""
    found = measure_log_probs(called, model_inputs(batch, prefix))
    return sum_answers(found.log_prob_N, batch, prefix), found.entropy_N.double().sum()


def sum_answers(value_N: Tensor, batch: Batch, prefix: str = "") -> Tensor:
    """The sum over the targets of each answer, float64."""
    zeros_S = value_N.new_zeros(len(batch[prefix + "num_targets_S"]), dtype=torch.float64)
    return zeros_S.index_add(0, batch[prefix + "answer_N"], value_N.double())


def reference_of_answers(model: Any, batch: Batch, prefix: str = "") -> Tensor:
    """The summed log-probability of each answer under the reference, float64.

    Known beforehand, or `model` with its adapter off.
    """
    known_S = batch.get(prefix + "reference_S")
    if known_S is not None:
        return known_S
    with torch.no_grad(), adapter_off(model) as base:
        return log_probs_of_answers(base, batch, prefix)[0]


def measure_answers(model: Any, called: Any, batch: Batch, loss: PreferenceLoss) -> AnswerLogProbs:
    """Run a micro-batch forward, and first the reference, if the loss has one."""
    reference_S = weight_N = weights_S = None
    if isinstance(loss, DpoLoss) and loss.weigh is not None:
        reference_S, weight_N = _weighed_reference(model, batch, loss.weigh)
    elif compares_with_reference(loss):
        reference_S = reference_of_answers(model, batch)
    found = measure_log_probs(called, model_inputs(batch))
    log_prob_S = sum_answers(found.log_prob_N, batch)
    if weight_N is not None:
        weighed_N = weigh(weight_N, found.log_prob_N.double())
        weights_S = sum_answers(weighed_N, batch), sum_answers(weight_N, batch)
    is_desirable_S = batch.get("is_desirable_S")
    if is_desirable_S is None:
        is_desirable_S = torch.arange(len(log_prob_S), device=log_prob_S.device) % 2 == 0
    return AnswerLogProbs(
        log_prob_S,
        batch["num_targets_S"],
        is_desirable_S,
        found.entropy_N.double().sum().detach(),
        reference_S,
        weights_S,
    )


def _weighed_reference(model: Any, batch: Batch, curve: str) -> tuple[Tensor, Tensor]:
    """The weighed log-probability of each answer under the model without its adapter, and the
    weight of each target, both float64."""
    with torch.no_grad(), adapter_off(model) as base:
        found = measure_log_probs(base, model_inputs(batch))
    log_prob_N = found.log_prob_N.double()
    weight_N = CURVES[curve](-log_prob_N, found.entropy_N.double())
    return sum_answers(weigh(weight_N, log_prob_N), batch), weight_N


def count_rows(batch: Batch) -> int:
    """Pairs, or rated answers, of a micro-batch."""
    return len(batch["num_targets_S"]) // (1 if "is_desirable_S" in batch else 2)


def count_chosen_targets(batch: Batch) -> Tensor:
    """Targets of the better answers of a micro-batch of pairs."""
    return batch["num_targets_S"][0::2].sum()


def sum_other_ratios(model: Any, batch: Batch) -> Tensor:
    """The log-probabilities of the answers to other prompts minus the reference's, summed."""
    reference_S = reference_of_answers(model, batch, OTHER)
    return (log_probs_of_answers(model, batch, OTHER)[0] - reference_S).sum()


def loss_of_rows(answers: AnswerLogProbs, loss: PreferenceLoss, z0: Tensor) -> Tensor:
    """The loss of each pair or rated answer, without the share of `sft`."""
    match loss:
        case DpoLoss():
            ratio_S = answers.ratio_S
            if loss.length == "mean":
                ratio_S = ratio_S / answers.size_S
            return dpo_loss(
                ratio_S[0::2] - ratio_S[1::2],
                form=loss.form,
                beta=loss.beta,
                label_smoothing=loss.label_smoothing,
            )
        case SimpoLoss():
            mean_S = answers.mean_S
            return simpo_loss(mean_S[0::2], mean_S[1::2], beta=loss.beta, gamma=loss.gamma)
        case OrpoLoss():
            mean_S = answers.mean_S
            return orpo_loss(mean_S[0::2], mean_S[1::2], beta=loss.beta)
        case KtoLoss():
            return kto_loss(
                answers.ratio_S,
                answers.is_desirable_S,
                z0,
                beta=loss.beta,
                desirable_weight=loss.desirable_weight,
                undesirable_weight=loss.undesirable_weight,
            )
        case _:
            assert_never(loss)


def rewards(answers: AnswerLogProbs, loss: PreferenceLoss) -> Tensor:
    """How much the loss makes the model prefer each answer: beta times what it compares."""
    match loss:
        case DpoLoss() if loss.length == "mean":
            value_S = answers.ratio_S / answers.size_S
        case DpoLoss() | KtoLoss():
            value_S = answers.ratio_S
        case SimpoLoss() | OrpoLoss():
            value_S = answers.mean_S
        case _:
            assert_never(loss)
    return loss.beta * value_S


OF_ROWS = ("rows", "loss", "correct", "longer_wins", "baseline", "entropy")
OF_SIDES = ("answers", "reward", "ratio", "loss", "targets")
RECORD = (*OF_ROWS, *(f"{side}_{name}" for side in ("chosen", "rejected") for name in OF_SIDES))
"""The names of the sums in a record."""


def record_of(answers: AnswerLogProbs, loss: PreferenceLoss, loss_R: Tensor, z0: Tensor) -> Tensor:
    """The sums to log of a micro-batch, detached, float64; see RECORD. `loss_R`: of each row."""
    found = answers.detached()
    reward_S, is_better_S = rewards(found, loss), found.is_desirable_S
    longer = reward_S.new_zeros(())
    if isinstance(loss, KtoLoss):
        win_R = torch.where(is_better_S, 1.0, -1.0) * (found.ratio_S - z0)
    else:
        win_R = reward_S[0::2] - reward_S[1::2]
        longer = (found.num_targets_S[0::2] > found.num_targets_S[1::2]).double().sum()
    # A draw counts half: before the first update nothing else is there.
    correct = (win_R > 0).double().sum() + (win_R == 0).double().sum() / 2
    rows = torch.full_like(longer, len(win_R))
    parts = [rows, loss_R.detach().double().sum(), correct, longer, rows * z0, found.entropy]
    ratio_S = torch.zeros_like(reward_S) if found.reference_S is None else found.ratio_S
    for is_side_S in (is_better_S, ~is_better_S):
        side_S = is_side_S.double()
        values = (side_S, reward_S, ratio_S, -found.log_prob_S, found.num_targets_S)
        # Not a product: what is not finite on one side must not spoil the other.
        parts += [torch.where(is_side_S, value_S, 0.0).double().sum() for value_S in values]
    return torch.stack([part.to(rows.device) for part in parts])


def figures_of_answers(loss: PreferenceLoss, sums: Sequence[float]) -> Figures:
    """The figures of summed records, under their names in metrics.jsonl.

    `loss` is per pair or rated answer, as it is minimised. Rewards are beta times what the loss
    compares; log ratios are nats per answer against the reference; `chosen_loss` and
    `rejected_loss` are nats per target. What a log has no answer for is left out.
    """
    of = dict(zip(RECORD, sums, strict=True))
    rows = max(of["rows"], 1)
    figures = {"loss": of["loss"] / rows, "reward_accuracy": of["correct"] / rows}
    sides = [side for side in ("chosen", "rejected") if of[f"{side}_answers"]]
    if len(sides) == 2:
        chosen, rejected = (of[f"{side}_reward"] / of[f"{side}_answers"] for side in sides)
        figures["reward_margin"] = chosen - rejected
    for side in sides:
        if compares_with_reference(loss):
            figures[f"{side}_log_ratio"] = of[f"{side}_ratio"] / of[f"{side}_answers"]
        figures[f"{side}_loss"] = of[f"{side}_loss"] / max(of[f"{side}_targets"], 1)
    if sft := getattr(loss, "sft", 0.0):
        figures["loss"] += sft * figures.get("chosen_loss", 0.0)
    targets = of["chosen_targets"] + of["rejected_targets"]
    figures["entropy"] = of["entropy"] / max(targets, 1)
    if isinstance(loss, KtoLoss):
        figures["kl_estimate"] = of["baseline"] / rows
        figures["answers"] = int(of["rows"])
    else:
        figures["longer_wins"] = of["longer_wins"] / rows
        figures["pairs"] = int(of["rows"])
    return {**figures, "targets": int(targets)}
