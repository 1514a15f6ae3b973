"""`yrun replay`: the base writes the rows that a recipe holds on to, before it is trained."""

from collections.abc import Callable
from pathlib import Path

from yrunner.assembly.replay import wanted_rows, writing_of, written_rows
from yrunner.console import say
from yrunner.errors import YRunnerError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe

SHOWN = 3


def replay(path: Path, overrides: list[str], *, train_base: Callable[[Recipe], None]) -> None:
    """Let the base of the recipe write what is still missing, and show some of it.

    Raises `YRunnerError` for a recipe whose base is asked for no row.
    """
    recipe = load_recipe(path, overrides)
    wanted = wanted_rows(recipe)
    if not (wanted.rows or wanted.held_out):
        raise YRunnerError(
            f"{recipe.name} asks its base for no rows",
            remedy='set keep, for example "keep={kind: self_replay}"',
        )
    train_base(recipe)
    written = written_rows(recipe, writing_of(recipe), wanted)
    for line in [*written.rows, *written.held_out][:SHOWN]:
        say(line)
    say(f"rows to hold on to: {len(written.rows):,}, in {written.folder.rows}")
    say(f"rows for the gauge: {len(written.held_out):,}, in {written.folder.held_out}")
