"""The tokenizer of a recipe, also before its base has been trained."""

from typing import Any

from yrunner.commands.base import base_source, stale_base
from yrunner.commands.train_data import model_texts
from yrunner.models.load import load_tokenizer, set_chat_template
from yrunner.models.scratch import train_tokenizer
from yrunner.recipe.schema import Recipe


def recipe_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that the recipe's run uses.

    That of a new model is trained on its texts, which takes seconds and has one result; so a recipe
    can be checked whose base is a recipe without a result yet.
    """
    scratch = recipe.model.scratch
    if scratch is not None:
        return train_tokenizer(model_texts(recipe), scratch.vocab_size)
    stale = stale_base(recipe)
    if stale is not None:
        tokenizer = recipe_tokenizer(stale[0])
        if recipe.model.chat_template is not None:
            set_chat_template(tokenizer, recipe.model.chat_template)
        return tokenizer
    return load_tokenizer(
        base_source(recipe),
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
