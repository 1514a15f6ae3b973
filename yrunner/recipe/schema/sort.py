"""The recipe's `sort`: how rows are scored, in which order they are written, what is dropped."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import Section

ScoreName = Literal[
    "knn_loss",
    "unexplained",
    "similarity",
    "correlation",
    "surprise",
    "loss",
    "perplexity",
    "entropy",
    "excess",
    "divergence",
]
"""What a row is judged by; docs/guide/sort.md says how each is computed."""


class SortSection(Section):
    """What `yrun sort` makes of the training rows. Training itself does not read it."""

    score: ScoreName | None = None
    """The score that orders and drops. Default knn_loss: the loss of the model and of its memory of
    all other rows; with cross_fit, unexplained: what that memory did not expect, nor the models
    that have learned from other rows."""
    also: list[ScoreName] | None = None
    """Further scores for scores.jsonl and the report; default all. They cost next to nothing, but
    knn_loss and unexplained a quarter of a kilobyte of disk for each target."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """How many share the rows, each with a model of its own; auto: one for each GPU, or one."""
    cross_fit: int = Field(0, ge=0)
    """Judge each row by models that were trained on the other rows, in so many parts: 0 (by the
    base alone) or 2 and more. It finds wrong facts that a base cannot know."""
    cross_fit_steps: int | None = Field(None, ge=1)
    """Updates of each of these trainings; default as many as see each of its rows ten times."""
    order: Literal["ascending", "descending", "mixed", "blocks"] = "mixed"
    """ascending: the lowest score first. mixed: every stretch has low and high ones alike. blocks:
    easy to hard in blocks that are mixed inside."""
    blocks: int = Field(4, ge=1)
    """How many blocks; for order: blocks."""
    drop_share: float = Field(0.0, ge=0, lt=1)
    """Share of the rows that is dropped, the most suspicious ones."""
    drop_above: float | None = None
    """Drop rows with a score above this."""
    drop_below: float | None = None
    """Drop rows with a score below this."""
    keep: int | None = Field(None, ge=1)
    """Keep at most so many rows, the least suspicious ones."""

    @property
    def deciding(self) -> ScoreName:
        """The score that orders and drops."""
        return self.score or ("unexplained" if self.cross_fit else "knn_loss")

    @property
    def kinds(self) -> list[ScoreName]:
        """The scores by the base that are asked for, the deciding one first."""
        return [kind for kind in self._named if kind != "unexplained"]

    @property
    def crossed_kinds(self) -> list[ScoreName]:
        """Those by the models of a cross-fit."""
        return [kind for kind in self._named if kind != "knn_loss" and self.cross_fit]

    @property
    def asks_neighbours(self) -> bool:
        """Whether a score needs to know what stands in like places of other rows."""
        return "knn_loss" in self.kinds or "unexplained" in self.crossed_kinds

    @property
    def _named(self) -> list[ScoreName]:
        also = get_args(ScoreName) if self.also is None else self.also
        return list(dict.fromkeys([self.deciding, *also]))

    @model_validator(mode="after")
    def one_part_leaves_nothing_to_train_on(self) -> Self:
        if self.cross_fit == 1:
            raise ValueError(
                "cross_fit must be 0 or at least 2: with one part there are no other rows"
            )
        return self

    @model_validator(mode="after")
    def steps_need_a_training(self) -> Self:
        if self.cross_fit_steps is not None and not self.cross_fit:
            raise ValueError("cross_fit_steps needs cross_fit; set that to 3, or remove this")
        return self

    @model_validator(mode="after")
    def unexplained_needs_a_training(self) -> Self:
        if "unexplained" in (self.score, *(self.also or ())) and not self.cross_fit:
            raise ValueError("unexplained needs cross_fit; set that to 3, or name another score")
        return self

    @model_validator(mode="after")
    def bounds_leave_rows_between_them(self) -> Self:
        above, below = self.drop_above, self.drop_below
        if above is not None and below is not None and below >= above:
            raise ValueError("drop_below must be below drop_above, or every row is dropped")
        return self
