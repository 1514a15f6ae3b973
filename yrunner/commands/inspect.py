"""`yrun inspect`: real examples, token by token, as the model will see them."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.text import Text

from yrunner.commands.data_files import recipe_rules, recipe_sources
from yrunner.commands.find_row import find_file, find_row, parse_place, raw_row
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import finish_data, read_data
from yrunner.commands.train_plan import plan_run
from yrunner.console import is_terminal, printable, say, terminal
from yrunner.data.conversation import Conversation, FaultyRow, TokenizedExample, TokenizedParts
from yrunner.data.pipeline import fit
from yrunner.data.plan import Plan
from yrunner.data.refusals import Refusal
from yrunner.data.render import tokenize_chunks
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.reports.token_view import TokenView


def inspect(path: Path, overrides: list[str], *, number: int, row: str | None) -> None:
    """Print the first `number` examples, or packed rows, of the training in its order.

    `row` is the place of a single row that is shown instead, such as `train.jsonl:12`, also when it
    is not learned from. Raises `YRunnerError` where there is no such row.
    """
    recipe = load_recipe(path, overrides)
    shown = _first_rows(recipe, number) if row is None else _one_row(recipe, row)
    for text in shown:
        _print(text)


def _first_rows(recipe: Recipe, number: int) -> Iterator[Text]:
    tokenizer = recipe_tokenizer(recipe)
    prepared = read_data(recipe, tokenizer)
    finish_data(recipe, prepared)
    view = _view(recipe, tokenizer)
    yield view.legend()
    rows = list(islice(rows_in_order(plan_run(recipe, prepared)), number))
    for place, row in enumerate(rows, start=1):
        examples = [prepared.train[index] for index in row]
        if recipe.data.packing:
            yield view.packed_row(place, examples, recipe.data.max_length)
        for example in examples:
            yield view.example(example, _num_cut(example, recipe, tokenizer))


def rows_in_order(plan: Plan) -> Iterator[tuple[int, ...]]:
    """The examples of each row of tokens, once each, as the first epoch takes them up."""
    num_micro_batches = plan.epoch_ends[0] * plan.num_micro_batches
    met: set[tuple[int, ...]] = set()
    for micro_batch in islice(plan, num_micro_batches):
        for slices in micro_batch:
            row = tuple(example for example, _ in slices)
            if row not in met:
                met.add(row)
                yield row


def _one_row(recipe: Recipe, place: str) -> Iterator[Text]:
    name, number = parse_place(place)
    file, reading = find_file(name, recipe_sources(recipe))
    found = find_row(file, reading, number)
    tokenizer = recipe_tokenizer(recipe)
    view = _view(recipe, tokenizer)
    whole = _tokenize(found, recipe, tokenizer)
    if isinstance(whole, Refusal):
        yield view.left_out(whole.origin, whole.reason)
        yield Text(printable(raw_row(whole.origin, reading)))
        return
    yield view.legend()
    rules = recipe_rules(recipe)
    try:
        is_text = isinstance(found, Conversation) and found.is_text
        pieces = fit(whole, rules, is_text=is_text)
    except FaultyRow as fault:
        yield view.left_out(whole.origin, str(fault))
        pieces = [whole.cut(0, rules.max_length)]
    num_cut = len(whole) - len(pieces[0]) if len(pieces) == 1 else 0
    for piece in pieces:
        yield view.example(piece.example(), num_cut)


def _tokenize(
    row: Conversation | Refusal, recipe: Recipe, tokenizer: Any
) -> TokenizedParts | Refusal:
    """The row before it is cut to the longest length."""
    if isinstance(row, Refusal):
        return row
    rules = recipe_rules(recipe)
    ((result,),) = tokenize_chunks([[row]], tokenizer, system=rules.system, targets=rules.targets)
    if isinstance(result, FaultyRow):
        return Refusal(row.origin, result.kind, str(result))
    return result


def _num_cut(example: TokenizedExample, recipe: Recipe, tokenizer: Any) -> int:
    """Tokens of the example's row that were cut off: prepared examples do not tell."""
    length = len(example.input_ids)
    if recipe.data.too_long != "cut" or length < recipe.data.max_length:
        return 0
    file, reading = find_file(str(example.origin.file), recipe_sources(recipe))
    whole = _tokenize(find_row(file, reading, example.origin.row), recipe, tokenizer)
    assert isinstance(whole, TokenizedParts), "a prepared row can be tokenized"
    return len(whole) - length


def _view(recipe: Recipe, tokenizer: Any) -> TokenView:
    has_colours = is_terminal() and not terminal().no_color
    return TokenView(tokenizer, token_batch=recipe.train.token_batch, coloured=has_colours)


def _print(text: Text) -> None:
    """Print a paragraph, its lines unbroken: a line end on the screen is one of the text."""
    if is_terminal():
        terminal().print(text, end="\n\n", soft_wrap=True)
    else:
        say(f"{text.plain}\n")
