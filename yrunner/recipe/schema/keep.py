"""The recipe's `keep` and `drift`: preserve what the base knew, and measure forgetting."""

from typing import Annotated, Literal

from pydantic import Field

from yrunner.recipe.schema.section import RecipePlace, Section


class NoKeep(Section):
    """No regulariser."""

    kind: Literal["none"] = "none"


class ReplayWriting(Section):
    """How the base generates replay rows."""

    temperature: float = Field(1.0, gt=0)
    """1: the base's own distribution; above 1: rarer text; below 1: only common text."""
    openings: list[Annotated[str, Field(min_length=1)]] = Field([])
    """First words of the questions, used in turn, to select languages or topics. Default: none,
    the base starts freely."""
    max_new_tokens: int | None = Field(None, ge=4)
    """Maximum length in tokens of a question, and of an answer. Longer ones are cut off and kept
    without an end; `by: text` does not learn them. Default: half of data.max_length, at most 64,
    or 256 for `by: text`."""
    write_minutes: float = Field(5.0, gt=0)
    """Maximum time for writing rows; when it is over, those written so far must do. How many these
    are then depends on the machine. Rows that are on disk are not written again."""


class HeldToRows(Section):
    """Keys shared by the kinds that add replay rows to every update."""

    share: float = Field(0.33, gt=0, lt=1)
    """Share of replay rows among the examples (or packed rows) of each update."""
    strength: float = Field(2.0, gt=0)
    """Weight of the replay rows' mean loss, relative to the mean loss of the training targets."""


class SelfReplay(HeldToRows, ReplayWriting):
    """Replay rows that the base generated; see docs/guide/keep.md."""

    kind: Literal["self_replay"]
    rows: int = Field(64, ge=1)
    """Number of rows that the base generates; later runs with the same base reuse them."""
    by: Literal["kl", "text"] = "kl"
    """`kl`: match the base's predictions at every token. `text`: train on its tokens only."""
    top: int = Field(64, ge=1)
    """Number of the base's most likely tokens stored on disk per position, if all weights are
    trained. A new adapter needs no storage: the base is the model with the adapter disabled."""


class KeepRows(HeldToRows):
    """Replay rows from a file, such as a general corpus."""

    kind: Literal["rows"]
    file: RecipePlace
    """A data file, or a folder of them, in any format of `data`. Relative to the recipe."""
    by: Literal["kl", "text"] = "kl"
    """`kl`: match the base's predictions at every target. `text`: train on the targets."""
    top: int = Field(64, ge=1)
    """As for self_replay."""


class Ewc(ReplayWriting):
    """Elastic Weight Consolidation: penalise changes of weights that the base depends on."""

    kind: Literal["ewc"]
    strength: float = Field(100.0, gt=0)
    """Weight of the penalty, a quadratic approximation of the divergence that `self_replay`
    measures. Use a larger value than there: far from the base the penalty is too small."""
    rows: int = Field(200, ge=1)
    """Number of rows that the base generates to estimate the importance of its weights."""
    file: RecipePlace | None = None
    """Use rows of this data file instead of generated ones."""


Keep = Annotated[NoKeep | SelfReplay | KeepRows | Ewc, Field(discriminator="kind")]


class DriftSection(Section):
    """Measure forgetting: KL(base || tuned) on rows that the base generated, never trained on."""

    rows: int = Field(16, ge=0)
    """Number of rows to measure at every validation; 0 disables the measurement."""
    top: int = Field(64, ge=1)
    """Number of the base's most likely tokens stored per position, if all weights are trained."""
