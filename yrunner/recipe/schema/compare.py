"""The recipe's `compare`: the arms of an experiment, and how they are set against each other."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import Section

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SET_BY_THE_EXPERIMENT = ("name", "output", "seed", "eval", "compare", "train.checkpoint.keep")
OF_OTHER_COMMANDS = ("sort", "merge")
FIXED_KEYS = (*SET_BY_THE_EXPERIMENT, *OF_OTHER_COMMANDS)
"""What an arm may not change: it is the same for all, or no training reads it."""


def is_fixed(key: str) -> bool:
    """Whether a dotted key, or a section that holds it, is one that no arm may change."""
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS)


class CompareSection(Section):
    """The arms and seeds of an experiment, for `yrun compare`; see docs/guide/compare.md."""

    arms: dict[str, dict[str, Any]] = Field({})
    """For each arm, by its name, the dotted keys that it changes: `slow: {train.learning_rate:
    1e-5}`. `{}` is the recipe as it stands. The others are set against the first."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0, 1, 2], min_length=1)
    """Each arm is trained once with each of these."""
    domain_accuracy: float | None = Field(None, gt=0, le=1)
    """The score of the domain's tasks at which arms are compared as equals; default 90 % of what
    the best arm reaches."""
    checkpoints: Literal["last", "all"] = "last"
    """Which checkpoints of an arm stay on the disk after all of them have been measured."""

    @model_validator(mode="after")
    def arms_have_names_for_folders(self) -> Self:
        for name in self.arms:
            if not ARM_NAME.fullmatch(name):
                raise ValueError(
                    f'arms: "{name}" cannot be the name of an arm; '
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
            raise ValueError("seeds: each may stand there once")
        return self
