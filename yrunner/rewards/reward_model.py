"""A reward from a reward model: a folder, or the result of a recipe."""

from collections.abc import Sequence
from pathlib import Path

from yrunner.data.conversation import Conversation, Message
from yrunner.errors import DataError, RunError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.schema.section import is_recipe_path
from yrunner.rewards.completion import Completion
from yrunner.scoring.reward_model import AdapterScores, RewardModel
from yrunner.storage.run_dir import RunDir


def reward_model_folder(model: Path) -> Path:
    """The folder of a reward model; `model` is it, or the recipe whose result it is.

    Raises `RunError` if the recipe has no reward model as its result.
    """
    if not is_recipe_path(str(model)):
        return model
    recipe = load_recipe(model)
    check_makes_reward_model(recipe, model)
    folder = RunDir(recipe.run_folder)
    if not folder.is_finished():
        raise RunError(
            f"rewards: the reward model {recipe.name} has not been trained yet",
            remedy=f"train it first: yrun train {model}",
        )
    return folder.model


def check_makes_reward_model(recipe: Recipe, path: Path) -> None:
    """Raise `RunError` if the result of a recipe is no reward model."""
    if recipe.train.stage != "reward":
        raise RunError(
            f"{path} has train.stage {recipe.train.stage}, which makes no reward model",
            remedy="give a recipe with train.stage: reward",
        )


class ModelScores:
    """The scores of a reward model."""

    def __init__(
        self,
        model: Path,
        name: str,
        weight: float,
        batch_size: int,
        beside: AdapterScores | None = None,
    ) -> None:
        """Loads the model, unless it is an adapter in memory. Raises `YRunnerError` without one."""
        self.name, self.weight, self.batch_size = name, weight, batch_size
        self.model = RewardModel(reward_model_folder(model), beside)

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """The score of each answer; None for an empty one, and for one that is too long.

        Raises `DataError` for a score that is not finite.
        """
        conversations = [
            Conversation((*each.prompt, Message("assistant", each.text)), each.origin)
            for each in completions
        ]
        # The prompts have the system message of the recipe already.
        scores = self.model.score(conversations, system=None, batch_size=self.batch_size)
        for completion, score in zip(completions, scores, strict=True):
            if score is not None and score - score != 0:
                raise DataError(
                    completion.origin,
                    f'the reward "{self.name}" is {score} for an answer to this row',
                    remedy="train the reward model again",
                )
        return scores
