"""`yrun chat`: talk to the result of a recipe."""

import sys
from collections.abc import Iterator
from pathlib import Path

from yrunner.commands.finished import finished_run, tuned_model, tuned_tokenizer
from yrunner.console import is_terminal, say
from yrunner.data.conversation import Message
from yrunner.data.render import prompt_text
from yrunner.evaluation.generate import generate_answers
from yrunner.recipe.load import load_recipe


def chat(path: Path, overrides: list[str], *, max_new_tokens: int) -> None:
    """Answer each line of standard input; the conversation goes on until /reset or its end."""
    recipe = load_recipe(path, overrides)
    run_dir = finished_run(recipe)
    tokenizer, model = tuned_tokenizer(run_dir), tuned_model(recipe, run_dir)
    messages: list[Message] = []
    for line in _lines():
        if line == "/reset":
            messages.clear()
            continue
        messages.append(Message("user", line))
        prompt = prompt_text(messages, tokenizer, recipe.data.system)
        (answer,) = generate_answers(
            model, tokenizer, [prompt], max_new_tokens=max_new_tokens, batch_size=1
        )
        messages.append(Message("assistant", answer))
        say(answer)


def _lines() -> Iterator[str]:
    """What the person types, or what comes out of a pipe, without empty lines."""
    if is_terminal():
        say("ask something; /reset forgets what was said, Ctrl-D ends")
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
