"""The recipe's `loss` for `train.stage: preference` and `reward`: losses over pairs of answers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import Section

SMALL_BETA = 1.0
"""With `length: mean`, margins are nats per token, and a beta below this is far too small."""


class DpoLoss(Section):
    """Direct Preference Optimization (Rafailov et al., 2023, arXiv:2305.18290) and its forms.

    D is how much more the model prefers the chosen answer to the rejected one than the reference
    does: a difference of log-probability ratios, in nats.
    """

    kind: Literal["dpo"]
    form: Literal["sigmoid", "ipo", "hinge", "robust", "conservative"] = "sigmoid"
    """`sigmoid`: the paper's, -log sigmoid(beta D). `conservative` and `robust`: some pairs are
    swapped, see label_smoothing. `hinge`: max(0, 1 - beta D). `ipo`: (D - 1 / (2 beta))^2."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference: a larger beta moves it less."""
    length: Literal["sum", "mean"] = "sum"
    """`sum`: log-probabilities of whole answers. `mean`: per token, so that length does not count;
    it needs a beta of about 1 to 10."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Expected share of swapped pairs, for `conservative` and `robust`."""
    sft: float = Field(0.0, ge=0)
    """Weight of the mean cross-entropy of the chosen answers, added to the loss."""
    weigh: Literal["nlirg", "nlirg_entropy", "dft"] | None = None
    """An experiment: D weighs each token by its loss under the reference, by the curve of this name
    with its default values. It needs a new adapter."""

    @model_validator(mode="after")
    def only_two_forms_expect_swapped_pairs(self) -> Self:
        expects = self.form in ("conservative", "robust")
        if self.label_smoothing and not expects:
            raise ValueError(
                f"form {self.form} has no label_smoothing; set form to conservative or robust, "
                "or remove label_smoothing"
            )
        if expects and not self.label_smoothing:
            raise ValueError(
                f"form {self.form} needs label_smoothing, the expected share of swapped pairs: "
                "set it to 0.1, for example, or form to sigmoid"
            )
        return self


class SimpoLoss(Section):
    """SimPO (Meng et al., 2024, arXiv:2405.14734): log-probability per token, no reference."""

    kind: Literal["simpo"]
    beta: float = Field(2.0, gt=0)
    """Scale of the log-probabilities per token."""
    gamma: float = Field(1.0, ge=0)
    """Margin by which the chosen answer should win, in units of beta times nats per token."""
    sft: float = Field(0.0, ge=0)
    """Weight of the mean cross-entropy of the chosen answers, added to the loss."""


class OrpoLoss(Section):
    """ORPO (Hong et al., 2024, arXiv:2403.07691): cross-entropy and odds ratio, no reference."""

    kind: Literal["orpo"]
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the cross-entropy of the chosen answer: the paper's
    lambda."""


class KtoLoss(Section):
    """KTO (Ethayarajh et al., 2024, arXiv:2402.01306): answers marked good or bad, not pairs."""

    kind: Literal["kto"]
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference: a larger beta moves it less."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of the good answers. Balance it with the other one if there are far more of one kind:
    weight times number should be within 1:1 and 4:3."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of the bad answers."""

    @model_validator(mode="after")
    def something_is_learned(self) -> Self:
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0: nothing is learned; raise one"
            )
        return self


class BradleyTerryLoss(Section):
    """A reward model: the chosen answer should score higher (Bradley and Terry, 1952)."""

    kind: Literal["bradley_terry"]
    margin: float = Field(0.0, ge=0)
    """How much higher the chosen answer should score."""
    center: float = Field(0.0, ge=0)
    """Weight of the squared sum of the two scores, which keeps scores around 0; 0.01 is usual."""
