"""The plan of a recipe's run over its prepared data, and how its micro-batches are laid out."""

from typing import Any

import torch

from yrunner.data.batching.collate import BatchLayout, choose_layout
from yrunner.data.batching.plan import Plan, make_plan
from yrunner.data.dataset.splits import Prepared
from yrunner.distributed.topology import lay_out
from yrunner.recipe.schema.keep import HeldToRows
from yrunner.recipe.schema.recipe import Recipe


def plan_run(recipe: Recipe, prepared: Prepared, *, num_ranks: int | None = None) -> Plan:
    """What the run learns from at which update, exactly.

    `num_ranks` processes begin it; None: as many as the recipe asks for.
    """
    if num_ranks is None:
        num_ranks = lay_out(recipe.distributed, torch.cuda.device_count()).num_ranks
    return make_plan(
        prepared.train.num_targets,
        lengths=prepared.train.lengths,
        pack_to=recipe.data.max_length if recipe.data.packing else None,
        token_batch=recipe.train.token_batch,
        batch_size=recipe.train.batch_size,
        accumulation=recipe.train.gradient_accumulation_steps * num_ranks,
        epochs=recipe.train.num_epochs,
        max_updates=recipe.train.max_steps,
        order=recipe.train.order,
        seed=recipe.seed,
        kept_share=recipe.keep.share if isinstance(recipe.keep, HeldToRows) else 0.0,
    )


def layout_for(config: Any, *, isolates: bool) -> BatchLayout:
    """The cheapest layout for a model of this config; `isolates`: see models/isolation.py."""
    text = config.get_text_config()
    return choose_layout(text._attn_implementation, hidden_size=text.hidden_size, isolates=isolates)
