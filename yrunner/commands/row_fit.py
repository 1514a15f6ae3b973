"""Whether every row finds a place in the model, which has only so many positions and embeddings."""

from typing import Any

from yrunner.commands.check_memory import recipe_config
from yrunner.data.prepared import Prepared
from yrunner.models.load import check_ids
from yrunner.models.positions import check_lengths
from yrunner.recipe.schema import Recipe


def check_fit(recipe: Recipe, tokenizer: Any, prepared: Prepared) -> None:
    """Look whether the recipe's model can read every row, before its weights are loaded.

    Raises `DataError` with the longest row where it has more tokens than the model positions, and
    `ModelError` where the tokenizer has ids that the model has no embedding for.
    """
    config = recipe_config(recipe, tokenizer)
    check_ids(tokenizer, config.get_text_config().vocab_size)
    for examples in (prepared.train, prepared.validation):
        check_lengths(examples.lengths, examples.origin, config)
