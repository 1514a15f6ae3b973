"""The model that a run starts from; when that is another recipe's result, make sure it exists."""

from yrunner.commands.fingerprint import changes_since
from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir


def stale_base(recipe: Recipe) -> tuple[Recipe, str] | None:
    """The recipe of the base, and why it has to be trained first; None when nothing has to."""
    path = base_recipe_path(recipe)
    if path is None:
        return None
    base = load_recipe(path)
    run_dir = RunDir(base.run_folder)
    if not run_dir.is_used():
        return base, f"{base.name} is the base and has not been trained yet: training it first"
    if not run_dir.fingerprint.exists():
        return base, f"{base.name} is the base and was not finished: training it first"
    changes = changes_since(run_dir, base)
    if changes:
        return (
            base,
            f"{base.name} is the base and has changed ({', '.join(changes)}): rebuilding it",
        )
    if not run_dir.is_finished():
        return base, f"{base.name} is the base and was not finished: going on with it"
    return None


def base_source(recipe: Recipe) -> str:
    """Folder or Hub id of the base, which has to exist by now."""
    path = base_recipe_path(recipe)
    if path is None:
        assert recipe.model.base is not None, "a model from scratch has no base"
        return recipe.model.base
    return str(RunDir(load_recipe(path).run_folder).model)
