"""`yrun inspect`: show training examples token by token, as the model sees them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.text import Text

from yrunner.assembly.run import Run
from yrunner.console import is_terminal, printable, show, terminal
from yrunner.data.batching.plan import Plan
from yrunner.data.chat.tokenize import tokenize_chunks
from yrunner.data.conversation import Conversation, FaultyRow, TokenizedExample, TokenizedParts
from yrunner.data.dataset.prepare import Source, fit
from yrunner.data.dataset.row_report import Refusal, num_rows
from yrunner.data.formats.formats import Reading, read_conversations
from yrunner.data.readers.files import read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError, Origin, YRunnerError
from yrunner.reports.token_view import TokenView

SHOWN_FILES = 10


@dataclass(frozen=True)
class FoundRow:
    """One row of the data and its examples."""

    examples: list[TokenizedExample]
    """What it trains, or would train if it were not left out; empty if it cannot be parsed."""
    left_out: Refusal | None
    """Why it is left out; None if it is not."""
    num_cut: int
    """Tokens cut off after its only example."""
    raw: str
    """The raw row if it has no examples."""


def inspect(path: Path, overrides: list[str], *, number: int, row: str | None) -> None:
    """Print the first `number` examples or packed rows in training order.

    `row`: show this row instead, such as `train.jsonl:12`, even if it is left out. Raises
    `YRunnerError` if there is no such row.
    """
    run = Run.load(path, overrides)
    recipe, tokenizer = run.recipe, run.tokenizer
    has_colours = is_terminal() and not terminal().no_color
    view = TokenView(tokenizer, token_batch=recipe.train.token_batch, coloured=has_colours)
    if row is None:
        shown = _show_first(run, number, view)
    else:
        shown = _show_one(run, row, view)
    for text in shown:
        show(text, end="\n\n")


def _show_first(run: Run, number: int, view: TokenView) -> Iterator[Text]:
    data, rows = run.recipe.data, first_rows(run, number)
    yield view.legend()
    for place, examples in enumerate(rows, start=1):
        if data.packing:
            yield view.packed_row(place, examples, data.max_length)
        for example in examples:
            yield view.example(example, count_cut(example, run))


def _show_one(run: Run, place: str, view: TokenView) -> Iterator[Text]:
    row = one_row(run, place)
    if row.examples:
        yield view.legend()
    if row.left_out is not None:
        yield view.left_out(row.left_out.origin, row.left_out.reason)
    if not row.examples:
        yield Text(printable(row.raw))
    for example in row.examples:
        yield view.example(example, row.num_cut)


def first_rows(run: Run, number: int) -> list[list[TokenizedExample]]:
    """The examples of the first token rows, in training order.

    Raises `YRunnerError` if training would refuse the data.
    """
    run.refuse_faulty_rows()
    rows = islice(_rows_in_order(run.plan()), number)
    return [[run.dataset.train[index] for index in row] for row in rows]


def one_row(run: Run, place: str) -> FoundRow:
    """The row at a place such as `train.jsonl:12`, even if it is left out.

    Raises `YRunnerError` if there is no such row.
    """
    name, number = parse_place(place)
    file, reading = find_file(name, run.sources)
    found = find_row(file, reading, number)
    whole = _tokenize(found, run)
    if isinstance(whole, Refusal):
        return FoundRow([], whole, 0, raw_row(whole.origin, reading))
    rules = run.rules
    left_out = None
    try:
        is_text = isinstance(found, Conversation) and found.is_text
        pieces = fit(whole, rules, is_text=is_text)
    except FaultyRow as fault:
        left_out = Refusal(whole.origin, fault.kind, str(fault))
        pieces = [whole.cut(0, rules.max_length)]
    num_cut = len(whole) - len(pieces[0]) if len(pieces) == 1 else 0
    return FoundRow([piece.example() for piece in pieces], left_out, num_cut, "")


def count_cut(example: TokenizedExample, run: Run) -> int:
    """Tokens of the example's row that were cut off, found by tokenizing it again."""
    length = len(example.input_ids)
    data = run.recipe.data
    if data.too_long != "cut" or length < data.max_length:
        return 0
    file, reading = find_file(str(example.origin.file), run.sources)
    whole = _tokenize(find_row(file, reading, example.origin.row), run)
    assert isinstance(whole, TokenizedParts), "a prepared row can be tokenized"
    return len(whole) - length


def _rows_in_order(plan: Plan) -> Iterator[tuple[int, ...]]:
    """The examples of each token row, once each, in the order of the first epoch."""
    num_micro_batches = plan.epoch_ends[0] * plan.num_micro_batches
    seen: set[tuple[int, ...]] = set()
    for micro_batch in islice(plan, num_micro_batches):
        for slices in micro_batch:
            row = tuple(example for example, _ in slices)
            if row not in seen:
                seen.add(row)
                yield row


def _tokenize(row: Conversation | Refusal, run: Run) -> TokenizedParts | Refusal:
    """The row before it is cut to data.max_length."""
    if isinstance(row, Refusal):
        return row
    rules = run.rules
    ((result,),) = tokenize_chunks(
        [[row]], run.tokenizer, system=rules.system, targets=rules.targets
    )
    if isinstance(result, FaultyRow):
        return Refusal(row.origin, result.kind, str(result))
    return result


def parse_place(place: str) -> tuple[str, int]:
    """The file and the row of `file:12`. Raises `YRunnerError` for another form."""
    name, _, number = place.rpartition(":")
    if not name or not number.isdecimal() or int(number) < 1:
        raise YRunnerError(
            f'--row "{place}" is not FILE:ROW', remedy="write it like train.jsonl:12"
        )
    return name, int(number)


def find_file(name: str, sources: Sequence[Source]) -> tuple[Path, Reading]:
    """The data file with this name or end of its path, and how it is read.

    Raises `YRunnerError` if there is none or more than one.
    """
    # A file can be in several sources; the last one decides.
    readings = {file: source.reading for source in sources for file in source.files}
    wanted = Path(name)
    exact = [file for file in readings if file.resolve() == wanted.resolve()]
    num_parts = len(wanted.parts)
    found = exact or [file for file in readings if file.parts[-num_parts:] == wanted.parts]
    if len(found) == 1:
        return found[0], readings[found[0]]
    if found:
        places = _listed([str(file) for file in found])
        raise YRunnerError(
            f"{len(found)} data files of the recipe end in {name}",
            remedy=f"write more of its path: {places}",
        )
    places = _listed(list(dict.fromkeys(file.name for file in readings)))
    raise YRunnerError(f"the recipe has no data file {name}", remedy=f"choose one of {places}")


def find_row(file: Path, reading: Reading, number: int) -> Conversation | Refusal:
    """The row with this number, or why it is refused.

    Raises `DataError` if the file has no such row.
    """
    rows, last = 0, 0
    for row in read_conversations(file, reading).rows:
        if row.origin.row == number:
            return row
        rows, last = rows + 1, row.origin.row
    what = "no such row" if number > last else "this line is empty"
    known = f"choose one from 1 to {last:,}" + ("" if rows == last else f" ({num_rows(rows)})")
    raise DataError(Origin(file, number), what, remedy=known)


def raw_row(origin: Origin, reading: Reading) -> str:
    """The row as indented JSON; empty if it cannot be parsed."""
    rows = read_rows(origin.file, document=reading.document)
    found = next(row for row_origin, row in rows if row_origin == origin)
    if isinstance(found, Damaged):
        return ""
    return json.dumps(found, ensure_ascii=False, indent=2, default=str)


def _listed(places: Sequence[str]) -> str:
    hidden = len(places) - SHOWN_FILES
    more = f" and {hidden:,} more" if hidden > 0 else ""
    return ", ".join(places[:SHOWN_FILES]) + more
