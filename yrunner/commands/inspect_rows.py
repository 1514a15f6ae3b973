"""Which rows `yrun inspect` shows: the first that the training takes up, or one by its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from yrunner.commands.data_files import recipe_rules, recipe_sources
from yrunner.commands.find_row import find_file, find_row, parse_place, raw_row
from yrunner.commands.train_data import finish_data, read_data
from yrunner.commands.train_plan import plan_run
from yrunner.data.conversation import Conversation, FaultyRow, TokenizedExample, TokenizedParts
from yrunner.data.pipeline import fit
from yrunner.data.plan import Plan
from yrunner.data.refusals import Refusal
from yrunner.data.render import tokenize_chunks
from yrunner.recipe.schema import Recipe


@dataclass(frozen=True)
class FoundRow:
    """One row of the data, and what becomes of it."""

    examples: list[TokenizedExample]
    """What is learned from it, or would be if it were not left out; none where it is no row."""
    left_out: Refusal | None
    """Why it is not learned from; None where it is."""
    num_cut: int
    """Tokens behind the only example that are cut off."""
    raw: str
    """The row as it stands in its file, where it has no examples."""


def first_rows(recipe: Recipe, tokenizer: Any, number: int) -> list[list[TokenizedExample]]:
    """The examples of the first rows of tokens, in the order of the training.

    Raises `YRunnerError` where the training would refuse the data.
    """
    prepared = read_data(recipe, tokenizer)
    finish_data(recipe, prepared)
    rows = islice(_rows_in_order(plan_run(recipe, prepared)), number)
    return [[prepared.train[index] for index in row] for row in rows]


def one_row(recipe: Recipe, tokenizer: Any, place: str) -> FoundRow:
    """The row of a place such as `train.jsonl:12`, also when it is not learned from.

    Raises `YRunnerError` where there is no such row.
    """
    name, number = parse_place(place)
    file, reading = find_file(name, recipe_sources(recipe))
    found = find_row(file, reading, number)
    whole = _tokenize(found, recipe, tokenizer)
    if isinstance(whole, Refusal):
        return FoundRow([], whole, 0, raw_row(whole.origin, reading))
    rules = recipe_rules(recipe)
    left_out = None
    try:
        is_text = isinstance(found, Conversation) and found.is_text
        pieces = fit(whole, rules, is_text=is_text)
    except FaultyRow as fault:
        left_out = Refusal(whole.origin, fault.kind, str(fault))
        pieces = [whole.cut(0, rules.max_length)]
    num_cut = len(whole) - len(pieces[0]) if len(pieces) == 1 else 0
    return FoundRow([piece.example() for piece in pieces], left_out, num_cut, "")


def count_cut(example: TokenizedExample, recipe: Recipe, tokenizer: Any) -> int:
    """Tokens of the example's row that were cut off: prepared examples do not tell."""
    length = len(example.input_ids)
    if recipe.data.too_long != "cut" or length < recipe.data.max_length:
        return 0
    file, reading = find_file(str(example.origin.file), recipe_sources(recipe))
    whole = _tokenize(find_row(file, reading, example.origin.row), recipe, tokenizer)
    assert isinstance(whole, TokenizedParts), "a prepared row can be tokenized"
    return len(whole) - length


def _rows_in_order(plan: Plan) -> Iterator[tuple[int, ...]]:
    """The examples of each row of tokens, once each, as the first epoch takes them up."""
    num_micro_batches = plan.epoch_ends[0] * plan.num_micro_batches
    met: set[tuple[int, ...]] = set()
    for micro_batch in islice(plan, num_micro_batches):
        for slices in micro_batch:
            row = tuple(example for example, _ in slices)
            if row not in met:
                met.add(row)
                yield row


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
