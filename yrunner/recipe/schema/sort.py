"""The recipe's `sort`: how rows are scored, ordered and dropped."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import RecipeFile, Section

TokenScoreName = Literal[
    "outlier",
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
"""Scores of an answer by its tokens; docs/guide/sort.md defines each of them."""
ScoreName = Literal[TokenScoreName, "margin"]
"""`margin` compares the answers of a pair."""
NEEDS_NEIGHBOURS: frozenset[str] = frozenset({"outlier", "knn_loss", "unexplained"})
"""Scores that look up similar places in other rows."""


class ClusterSection(Section):
    """Groups of rows that are about the same, found by HDBSCAN in the hidden states that `outlier`
    and `knn_loss` use. Needs the package scikit-learn (extra `clusters`); without it `yrun sort`
    finds none and says so."""

    smallest: int | None = Field(None, ge=2)
    """Rows of the smallest cluster. Default: half the square root of the number of rows, at least
    5."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Share of each cluster to keep, its least suspicious rows. Unlike drop_share it takes the
    same share of every topic, so none disappears. Rows in no cluster stay."""


class SortSection(Section):
    """How `yrun sort` scores and orders the training rows. `yrun train` does not use it."""

    score: ScoreName | None = None
    """Score used to order and drop rows. Default: outlier, how far the losses of the row are above
    those at similar places in other rows, of the model and of a nearest-neighbour memory of all
    other rows; with cross_fit: the same with models trained on the other rows. Of pairs and marked
    answers always margin: how much a model prefers the better answer."""
    also: list[TokenScoreName] | None = None
    """Additional scores for scores.jsonl and the report. Default: all. They cost almost nothing,
    except that outlier, knn_loss and unexplained use a quarter of a kilobyte of disk per target."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Number of processes, each with its own copy of the model; `auto`: one per GPU, or one."""
    cross_fit: int = Field(0, ge=0)
    """Number of folds; each row is scored by a model trained on the other folds. 0: use only the
    base. Finds wrong facts that the base cannot know."""
    cross_fit_steps: int | None = Field(None, ge=1)
    """Updates per fold. Default: enough to see each row ten times."""
    order: Literal["ascending", "descending", "mixed", "blocks"] = "mixed"
    """Order of the rows. `ascending`: lowest score first. `mixed`: low and high scores evenly
    interleaved. `blocks`: easy to hard in blocks, interleaved within each block."""
    blocks: int = Field(4, ge=1)
    """Number of blocks for order: blocks."""
    drop_share: float = Field(0.0, ge=0, lt=1)
    """Share of rows to drop, the most suspicious first."""
    drop_above: float | None = None
    """Drop rows with a score above this."""
    drop_below: float | None = None
    """Drop rows with a score below this."""
    keep: int | None = Field(None, ge=1)
    """Maximum number of rows to keep, the least suspicious first."""
    clusters: ClusterSection = ClusterSection()
    marks: RecipeFile | None = None
    """File of rows marked keep or drop, saved from the report page. A mark overrides all other
    rules."""

    @property
    def deciding(self) -> ScoreName:
        """The score used to order and drop rows."""
        return self.score or "outlier"

    @property
    def kinds(self) -> list[ScoreName]:
        """The requested scores that use the base, the deciding one first."""
        return [kind for kind in self._named if kind != "unexplained"]

    @property
    def crossed_kinds(self) -> list[ScoreName]:
        """The requested scores that use the cross-fit models."""
        return [kind for kind in self._named if kind != "knn_loss" and self.cross_fit]

    @property
    def asks_neighbours(self) -> bool:
        """Whether a score needs the nearest neighbours from other rows."""
        return not NEEDS_NEIGHBOURS.isdisjoint(self._named)

    @property
    def _named(self) -> list[ScoreName]:
        also = get_args(TokenScoreName) if self.also is None else self.also
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
    def clusters_need_hidden_states(self) -> Self:
        if self.clusters.keep is not None and not self.asks_neighbours:
            raise ValueError(
                "clusters.keep needs hidden states, which are stored for outlier and knn_loss; "
                "name one of them in score or also, or remove it"
            )
        return self

    @model_validator(mode="after")
    def bounds_leave_rows_between_them(self) -> Self:
        above, below = self.drop_above, self.drop_below
        if above is not None and below is not None and below >= above:
            raise ValueError("drop_below must be below drop_above, or every row is dropped")
        return self
