"""`yrun inspect`: real examples, token by token, as the model will see them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from yrunner.commands.inspect_rows import count_cut, first_rows, one_row
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.console import is_terminal, printable, show, terminal
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.reports.token_view import TokenView


def inspect(path: Path, overrides: list[str], *, number: int, row: str | None) -> None:
    """Print the first `number` examples, or packed rows, of the training in its order.

    `row` is the place of a single row that is shown instead, such as `train.jsonl:12`, also when it
    is not learned from. Raises `YRunnerError` where there is no such row.
    """
    recipe = load_recipe(path, overrides)
    tokenizer = recipe_tokenizer(recipe)
    has_colours = is_terminal() and not terminal().no_color
    view = TokenView(tokenizer, token_batch=recipe.train.token_batch, coloured=has_colours)
    if row is None:
        shown = _show_first(recipe, tokenizer, number, view)
    else:
        shown = _show_one(recipe, tokenizer, row, view)
    for text in shown:
        show(text, end="\n\n")


def _show_first(recipe: Recipe, tokenizer: Any, number: int, view: TokenView) -> Iterator[Text]:
    rows = first_rows(recipe, tokenizer, number)
    yield view.legend()
    for place, examples in enumerate(rows, start=1):
        if recipe.data.packing:
            yield view.packed_row(place, examples, recipe.data.max_length)
        for example in examples:
            yield view.example(example, count_cut(example, recipe, tokenizer))


def _show_one(recipe: Recipe, tokenizer: Any, place: str, view: TokenView) -> Iterator[Text]:
    row = one_row(recipe, tokenizer, place)
    if row.examples:
        yield view.legend()
    if row.left_out is not None:
        yield view.left_out(row.left_out.origin, row.left_out.reason)
    if not row.examples:
        yield Text(printable(row.raw))
    for example in row.examples:
        yield view.example(example, row.num_cut)
