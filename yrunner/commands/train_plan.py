"""The plan of a recipe's run over its prepared data, and how its micro-batches are laid out."""

from typing import Any

from yrunner.data.keep_plan import count_kept
from yrunner.data.layouts import Layout, choose_layout
from yrunner.data.plan import Plan, make_plan
from yrunner.data.prepared import Prepared
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_keep import HeldToRows


def plan_run(recipe: Recipe, prepared: Prepared) -> Plan:
    """What the run learns from at which update, exactly."""
    return make_plan(
        prepared.train.num_targets,
        lengths=prepared.train.lengths,
        pack_to=recipe.data.max_length if recipe.data.packing else None,
        token_batch=recipe.train.token_batch,
        batch_size=recipe.train.batch_size,
        accumulation=recipe.train.gradient_accumulation_steps,
        epochs=recipe.train.num_epochs,
        max_updates=recipe.train.max_steps,
        order=recipe.train.order,
        seed=recipe.seed,
        kept=kept_per_update(recipe),
    )


def kept_per_update(recipe: Recipe) -> int:
    """Rows of each update that are kept ones, of all its rows."""
    if not isinstance(recipe.keep, HeldToRows):
        return 0
    train = recipe.train
    return count_kept(recipe.keep.share, train.batch_size * train.gradient_accumulation_steps)


def layout_for(config: Any, *, isolates: bool) -> Layout:
    """The cheapest layout for a model of this config; `isolates`: see models/isolation.py."""
    text = config.get_text_config()
    return choose_layout(text._attn_implementation, hidden_size=text.hidden_size, isolates=isolates)
