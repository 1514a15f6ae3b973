"""From the recipe's `rewards` to objects that score answers."""

from collections.abc import Sequence

from yrunner.recipe.schema.rewards import RewardSection
from yrunner.rewards.completion import Reward


def make_rewards(sections: Sequence[RewardSection], *, trust_code: bool = False) -> list[Reward]:
    """A reward for each section, in order.

    Models and Python files are loaded here. Raises `YRunnerError` if one cannot be used, and for a
    Python function unless `trust_code`, the option `--trust-code`.
    """
    raise NotImplementedError
