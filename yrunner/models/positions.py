"""How many tokens a model can tell apart by their places, and the row that has more."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yrunner.errors import DataError, Origin

Lengths = Sequence[int] | NDArray[np.integer[Any]]


def check_lengths(lengths: Lengths, origin: Callable[[int], Origin], config: Any) -> None:
    """Raise `DataError` with the longest row where it has more tokens than the model positions.

    `lengths` are those of all rows, `origin` gives the place of one by its number among them.
    """
    positions = count_positions(config)
    if positions is None or not len(lengths):
        return
    longest = int(np.argmax(lengths))
    if lengths[longest] > positions:
        raise DataError(
            origin(longest),
            f"{lengths[longest]:,} tokens, and the model has {positions:,} positions",
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
