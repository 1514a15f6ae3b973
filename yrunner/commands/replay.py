"""`yrun replay`: the base writes the rows that a recipe holds on to, before it is trained."""

from collections.abc import Callable
from pathlib import Path

from yrunner.assembly.replay import wanted_rows, writing_of, written_rows
from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.errors import YRunnerError

SHOWN = 3


def replay(path: Path, overrides: list[str], *, train_base: Callable[[Run], None]) -> None:
    """Let the base of the recipe write what is still missing, and show some of it.

    Raises `YRunnerError` for a recipe whose base is asked for no row.
    """
    run = Run.load(path, overrides)
    wanted = wanted_rows(run.recipe)
    if not (wanted.rows or wanted.held_out):
        raise YRunnerError(
            f"{run.recipe.name} asks its base for no rows",
            remedy='set keep, for example "keep={kind: self_replay}"',
        )
    train_base(run)
    written = written_rows(run, writing_of(run.recipe), wanted)
    for line in [*written.rows, *written.held_out][:SHOWN]:
        say(line)
    say(f"rows to hold on to: {len(written.rows):,}, in {written.folder.rows}")
    say(f"rows for the gauge: {len(written.held_out):,}, in {written.folder.held_out}")
