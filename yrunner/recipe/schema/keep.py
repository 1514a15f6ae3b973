"""The recipe's `keep` and `drift`: how a model is held to its base, and the gauge of forgetting."""

from typing import Annotated, Literal

from pydantic import Field

from yrunner.recipe.schema.section import RecipePlace, Section


class NoKeep(Section):
    """Nothing holds the model but its learning rate and the weights of its tokens."""

    kind: Literal["none"] = "none"


class ReplayWriting(Section):
    """How the base writes rows of its own."""

    temperature: float = Field(1.0, gt=0)
    """1 draws what the base really says; above, rarer things; below, only what it says often."""
    openings: list[Annotated[str, Field(min_length=1)]] = Field([])
    """First words of the questions, taken in turns, for languages or topics. Default none: the base
    begins by itself."""
    max_new_tokens: int | None = Field(None, ge=4)
    """Longest question, and longest answer, in tokens; what does not end by then is dropped.
    Default half of data.max_length, and 256 at the most."""


class HeldToRows(Section):
    """What all ways share that show the model other rows beside those it learns."""

    share: float = Field(0.33, gt=0, lt=1)
    """Share of the examples (or packed rows) of each update that are kept rows."""
    strength: float = Field(2.0, gt=0)
    """Weight of their mean loss beside the mean loss of the field's targets."""


class SelfReplay(HeldToRows, ReplayWriting):
    """Hold the model to its base on rows that the base wrote; see docs/guide/keep.md."""

    kind: Literal["self_replay"]
    rows: int = Field(600, ge=1)
    """How many rows the base writes, once: later runs with this base find them."""
    by: Literal["kl", "text"] = "kl"
    """kl: what the base predicts at every token. text: only the tokens that it wrote."""
    top: int = Field(64, ge=1)
    """Likeliest tokens of the base that are kept on disk, where all weights are trained. With a new
    adapter nothing is: there the base is the model with the adapter off."""


class KeepRows(HeldToRows):
    """The same on rows of a file, such as a general corpus."""

    kind: Literal["rows"]
    file: RecipePlace
    """A data file, or a folder of them, in any format of `data`. Relative to the recipe."""
    by: Literal["kl", "text"] = "kl"
    """kl: what the base predicts at every target. text: learn the targets themselves."""
    top: int = Field(64, ge=1)
    """As with self_replay."""


class Ewc(ReplayWriting):
    """Hold every trained weight where it was, the more the base depends on it (EWC)."""

    kind: Literal["ewc"]
    strength: float = Field(100.0, gt=0)
    """Weight of the penalty: the quadratic form of the divergence that `self_replay` measures. It
    has to be larger than there: far from the base the form says too little."""
    rows: int = Field(200, ge=1)
    """How many rows the base writes to find out what it depends on."""
    file: RecipePlace | None = None
    """Or: rows of a file."""


Keep = Annotated[NoKeep | SelfReplay | KeepRows | Ewc, Field(discriminator="kind")]


class DriftSection(Section):
    """The gauge of forgetting: KL(base || tuned) on rows that the base wrote and none learns."""

    rows: int = Field(64, ge=0)
    """How many rows it is measured on, at every validation; 0 switches it off."""
    top: int = Field(64, ge=1)
    """Likeliest tokens of the base that are kept, where all weights are trained."""
