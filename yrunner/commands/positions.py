"""Whether every row finds a place in the model: it has only so many positions."""

from typing import Any

import numpy as np

from yrunner.commands.check_memory import recipe_config
from yrunner.data.prepared import Prepared
from yrunner.errors import DataError
from yrunner.recipe.schema import Recipe


def check_positions(recipe: Recipe, tokenizer: Any, prepared: Prepared) -> None:
    """Raise `DataError` with the longest row where it has more tokens than the model positions."""
    positions = count_positions(recipe_config(recipe, tokenizer))
    for examples in (prepared.train, prepared.validation):
        if positions is None or not len(examples):
            continue
        longest = int(np.argmax(examples.lengths))
        length = int(examples.lengths[longest])
        if length > positions:
            raise DataError(
                examples[longest].origin,
                f"{length:,} tokens, and the model has {positions:,} positions",
                remedy=f"set data.max_length to {positions}; data.too_long says what becomes of "
                "longer rows",
            )


def count_positions(config: Any) -> int | None:
    """Positions that a model has learned, or is stretched to; None where it sets no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    learned = rope.get("original_max_position_embeddings", positions)
    return max(positions, int(learned * rope.get("factor", 1)))
