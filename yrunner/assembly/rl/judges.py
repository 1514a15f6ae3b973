"""Reward models and critics that are adapters on the base of the model that is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from yrunner.console import say
from yrunner.distributed.collectives import this_rank
from yrunner.errors import ModelError
from yrunner.losses.score_head import CRITIC, add_critic
from yrunner.models.reward import add_score_adapter, find_score_adapter, read_origin_of
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.rewards import RewardModelReward
from yrunner.recipe.schema.rl import PpoLoss
from yrunner.recipe.schema.section import is_recipe_path
from yrunner.rewards.reward_model import reward_model_folder
from yrunner.scoring.reward_model import AdapterScores
from yrunner.storage.run_dir import RunDir

Origin = Mapping[str, Any]
"""Base of a run, and how it is held in memory; see `Run.origin`."""


def add_critic_of(loss: PpoLoss, model: Any, origin: Origin | None) -> None:
    """Add a critic to a tuned model, from what `loss.critic` names.

    `origin`: of the model; needed with `loss.critic`. Raises `ModelError` if that is no adapter on
    this base.
    """
    if loss.critic is None:
        add_critic(model)
        return
    adapter = find_score_adapter(_critic_folder(loss.critic))
    if adapter is None:
        raise ModelError(
            f"loss.critic: {loss.critic} holds no adapter with a score",
            remedy="name a reward model that was trained with tuning.kind lora or qlora, or a run "
            "with loss.kind ppo",
        )
    then = read_origin_of(adapter)
    assert origin is not None
    if then != origin:
        what = "another base" if then["base"] != origin["base"] else f"its base in {then['held']}"
        raise ModelError(
            f"loss.critic: {loss.critic} was trained on {what}, and this run has its own in "
            f"{origin['held']}",
            remedy="train it on this base in the same way",
        )
    add_critic(model, add_score_adapter(model, adapter, CRITIC))


def _critic_folder(place: Path) -> Path:
    if not is_recipe_path(str(place)):
        return place
    recipe = load_recipe(place)
    if isinstance(recipe.loss, PpoLoss):
        return RunDir(recipe.run_folder).critic
    return reward_model_folder(place)


def rewards_beside(
    rewards: Sequence[RewardModelReward], model: PeftModel, origin: Origin
) -> dict[Path, AdapterScores]:
    """The reward models that are adapters on the base of a model, added to it."""
    found: dict[Path, AdapterScores] = {}
    for section in rewards:
        adapter = find_score_adapter(reward_model_folder(section.model))
        if adapter is None or section.model in found or read_origin_of(adapter) != origin:
            continue
        name = f"reward{len(found)}"
        head = add_score_adapter(model, adapter, name)
        found[section.model] = AdapterScores(model, name, head)
        if this_rank() == 0:
            say(f"reward {section.shown_name}: an adapter on the base in memory, no second model")
    return found
