"""The command line. The only place that catches errors; nothing heavy is imported at the top."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from yrunner.console import fail, say
from yrunner.errors import YRunnerError

STOPPED = "stopped"
REPORT_A_BUG = "this is a bug of yrunner; please report it with the lines above"

WHAT_TO_DO = {
    errno.ENOSPC: "Free some space on the disk; a run goes on from its last checkpoint by --resume",
    errno.EDQUOT: "Free some of your quota; a run goes on from its last checkpoint by --resume",
    errno.EACCES: "Set the permissions so that it can be read and written, or choose another place",
    errno.EROFS: "Choose a place that can be written, such as output=/another/folder",
}
"""Faults of the disk that a person can mend, wherever they happen."""

app = typer.Typer(
    name="yrun",
    help="Fine-tune a language model for one field, driven by one recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.learning_rate=1e-5."),
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in its folder.")
    ] = False,
) -> None:
    """Train a model; its base is trained first when it is a recipe without a result."""
    if resume and overwrite:
        raise YRunnerError("--resume and --overwrite cannot be combined", remedy="choose one")
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.train import train as run_training

    run_training(recipe, overrides or [], resume=resume, overwrite=overwrite)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", min=1, help="How many rows of tokens.")] = 3,
    row: Annotated[
        str | None, typer.Option(metavar="FILE:ROW", help="One row, such as train.jsonl:12.")
    ] = None,
) -> None:
    """Print real examples as the model sees them, with what it learns in colour."""
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.inspect import inspect as run_inspection

    run_inspection(recipe, overrides or [], number=number, row=row)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read the data and plan the run: rows, steps, memory, disk. Trains nothing."""
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.check import check as run_check

    run_check(recipe, overrides or [], as_machine=as_json)


@app.command("eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Answer the recipe's tasks with its base and its result."""
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.eval import evaluate as run_evaluation

    run_evaluation(recipe, overrides or [])


@app.command()
def chat(
    recipe: RecipePath,
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to the result; it also answers the lines of a pipe."""
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.chat import chat as run_chat

    run_chat(recipe, overrides or [], max_new_tokens=max_new_tokens)


@app.command()
def merge(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Merge the adapter into its base, and check that both answer alike."""
    _check(recipe, overrides)
    with _stopping_at_once():
        from yrunner.commands.merge import merge as run_merge

    run_merge(recipe, overrides or [])


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to put them.")] = Path("recipes"),
) -> None:
    """Copy the recipes that come with yrunner, and their data, into a folder."""
    from yrunner.commands.init import init as copy_recipes

    copy_recipes(folder)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from yrunner.recipe.json_schema import recipe_json_schema

    say(json.dumps(recipe_json_schema(), ensure_ascii=False, indent=2))


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """For heavy imports: inside a C++ module, KeyboardInterrupt would abort the process."""

    def stop(_number: int, _frame: object) -> None:
        fail(STOPPED)
        os._exit(128 + signal.SIGINT)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _check(recipe: Path, overrides: list[str] | None) -> None:
    """Answer a faulty recipe at once, before torch is imported."""
    from yrunner.recipe.load import load_recipe

    load_recipe(recipe, overrides or [])


def main() -> None:
    """Run a command; exit with 2 for what the user can mend, 3 for what is missing, 1 for a bug."""
    try:
        app()
    except YRunnerError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        fail(STOPPED)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader went away (`yrun schema | head`); that is no fault of anybody.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  the last place
        if isinstance(error, OSError) and error.errno in WHAT_TO_DO:
            fail(f"{error.filename or 'writing'}: {error.strerror}. {WHAT_TO_DO[error.errno]}")
            sys.exit(2)
        traceback.print_exc()
        fail(REPORT_A_BUG)
        sys.exit(1)


if __name__ == "__main__":
    main()
