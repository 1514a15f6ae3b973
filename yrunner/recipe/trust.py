"""Say aloud when code that comes with a model is going to run: nobody should do that unawares."""

from yrunner.console import alert
from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema import Recipe


def alert_of_code(recipe: Recipe) -> None:
    """Print a red line for a recipe, or a recipe that is its base, that trusts a model's code."""
    if recipe.model.trust_remote_code:
        alert(
            f"model.trust_remote_code: Python code that comes with {recipe.model.base} runs here, "
            "with all rights that you have"
        )
    path = base_recipe_path(recipe)
    if path is not None:
        alert_of_code(load_recipe(path))
