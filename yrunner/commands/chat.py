"""`yrun chat`: talk to the result of a recipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from yrunner.commands.finished import finished_run, tuned_model, tuned_tokenizer
from yrunner.commands.talk import COMMANDS, Talk
from yrunner.console import is_terminal, say
from yrunner.recipe.load import load_recipe


def chat(path: Path, overrides: list[str], *, max_new_tokens: int) -> None:
    """Answer each line of standard input; the conversation goes on until /reset or its end."""
    recipe = load_recipe(path, overrides)
    run_dir = finished_run(recipe)
    tokenizer = tuned_tokenizer(run_dir)
    talk = Talk(recipe, tokenizer, tuned_model(recipe, run_dir), max_new_tokens)
    for line in _lines():
        if line.startswith("/"):
            talk.obey(line)
        else:
            talk.ask(line)


def _lines() -> Iterator[str]:
    """What the person types, or what comes out of a pipe, without empty lines."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and arrow keys
    if is_typed and is_terminal():
        say(f"ask something; {', '.join(COMMANDS)}; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> ") if is_typed else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
