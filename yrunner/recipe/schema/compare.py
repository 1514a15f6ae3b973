"""The recipe's `compare`: the arms of an experiment, and how they are compared."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import Section

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SET_BY_THE_EXPERIMENT = ("name", "output", "seed", "eval", "compare", "train.checkpoint.keep")
OF_OTHER_COMMANDS = ("sort", "merge")
FIXED_KEYS = (*SET_BY_THE_EXPERIMENT, *OF_OTHER_COMMANDS)
"""Keys that an arm may not change: fixed by the experiment, or not used by training."""


def is_fixed(key: str) -> bool:
    """Whether no arm may change this dotted key."""
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS)


class CompareSection(Section):
    """The arms that `yrun compare` trains and compares; see docs/guide/compare.md."""

    arms: dict[str, dict[str, Any]] = Field({})
    """The dotted keys that each named arm changes: `slow: {train.learning_rate: 1e-5}`. `{}` is
    the recipe unchanged. The first arm is the baseline."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0, 1, 2], min_length=1)
    """Seeds; each arm is trained once per seed."""
    domain_accuracy: float | None = Field(None, gt=0, le=1)
    """Domain score at which arms are compared. Default: 90 % of the best arm's score."""
    validation_loss: float | None = Field(None, gt=0)
    """Validation loss at which arms are compared too, in nats per target. Default: the loss that
    every run reaches."""
    checkpoints: Literal["last", "all"] = "last"
    """Which checkpoints of an arm to keep on disk once all have been measured."""

    @model_validator(mode="after")
    def arms_have_names_for_folders(self) -> Self:
        for name in self.arms:
            if not ARM_NAME.fullmatch(name):
                raise ValueError(
                    f'arms: "{name}" is not a valid arm name; '
                    "use letters, digits, dot, dash and underscore"
                )
        return self

    @model_validator(mode="after")
    def arms_change_only_what_is_trained(self) -> Self:
        for name, changes in self.arms.items():
            for key in changes:
                if is_fixed(key):
                    raise ValueError(
                        f'arms: "{name}" sets {key}, which is the same for every arm; remove it'
                    )
        return self

    @model_validator(mode="after")
    def seeds_are_different(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: list each seed once")
        return self
