"""The command line. The only place that catches errors; nothing heavy is imported at the top."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from yrunner.console import fail, say
from yrunner.errors import YRunnerError

REPORT_A_BUG = "this is a bug of yrunner; please report it with the lines above"

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
    from yrunner.recipe.load import load_recipe

    if resume and overwrite:
        raise YRunnerError("--resume and --overwrite cannot be combined", remedy="choose one")
    # Before torch is imported: a faulty recipe is answered at once.
    load_recipe(recipe, overrides or [])

    from yrunner.commands.train import train as run_training

    run_training(recipe, overrides or [], resume=resume, overwrite=overwrite)


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


def main() -> None:
    """Run a command; exit with 2 for what the user can mend, 3 for what is missing, 1 for a bug."""
    try:
        app()
    except YRunnerError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        fail("stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`yrun schema | head`); that is no fault of anybody.
        sys.stderr.close()
        sys.exit(0)
    except Exception:  # noqa: BLE001  the last place: everything else is a bug of ours
        traceback.print_exc()
        fail(REPORT_A_BUG)
        sys.exit(1)


if __name__ == "__main__":
    main()
