"""`yrun replay`: let the base write the replay rows of a recipe before training."""

from collections.abc import Callable
from pathlib import Path

from yrunner.assembly.replay import wanted_rows, writing_of, written_rows
from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.errors import YRunnerError

SHOWN = 3


def replay(path: Path, overrides: list[str], *, train_base: Callable[[Run], None]) -> None:
    """Let the base write missing replay rows, and show the first ones.

    Raises `YRunnerError` for a recipe that needs none.
    """
    run = Run.load(path, overrides)
    wanted = wanted_rows(run.recipe)
    if not (wanted.rows or wanted.drift_rows):
        raise YRunnerError(
            f"{run.recipe.name} needs no replay rows",
            remedy='set keep, for example "keep={kind: self_replay}"',
        )
    train_base(run)
    written = written_rows(run, writing_of(run.recipe), wanted)
    for line in [*written.rows, *written.drift_rows][:SHOWN]:
        say(line)
    say(f"replay rows: {len(written.rows):,}, in {written.folder.rows}")
    say(f"drift rows: {len(written.drift_rows):,}, in {written.drift_folder.held_out}")
