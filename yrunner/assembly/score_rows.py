"""A model scores examples the way a recipe would learn them, while a person sees how far it is."""

from collections.abc import Sequence
from typing import Any

from yrunner.console import progress
from yrunner.data.conversation import TokenizedExample
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.measure import TokenScores, score_tokens
from yrunner.training.arguments import token_weight


def score_rows(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    examples: Sequence[TokenizedExample],
    description: str,
) -> list[TokenScores]:
    """The scores of each example, in their order, with the weights of the recipe's loss."""
    scores = score_tokens(
        model,
        examples,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=recipe.train.batch_size,
        weight=token_weight(recipe.loss)[0],
    )
    found = []
    with progress(description, len(examples)) as advance:
        for scored in scores:
            found.append(scored)
            advance(1)
    return found
