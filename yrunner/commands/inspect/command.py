"""`yrun inspect`: show training examples token by token, as the model sees them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.text import Text

from yrunner.assembly.run import Run
from yrunner.console import is_terminal, printable, show, terminal
from yrunner.data.batching.plan import Plan
from yrunner.data.chat.template import read_turn_marks
from yrunner.data.conversation import (
    Answers,
    FaultyRow,
    RatedExample,
    TokenizedExample,
    TokenizedPair,
    TokenizedParts,
)
from yrunner.data.dataset.prepare import (
    Rules,
    Source,
    fit_row,
    read_allowed,
    special_ids_of,
    tokenize_rows,
)
from yrunner.data.dataset.prompts import PromptRow
from yrunner.data.dataset.row_report import Refusal, num_rows
from yrunner.data.formats.columns import EVERY_COLUMN, Need
from yrunner.data.formats.formats import Reading
from yrunner.data.readers.files import read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError, Origin, YRunnerError
from yrunner.reports.token_view import TokenView
from yrunner.tokens import IGNORE_INDEX

SHOWN_FILES = 10


@dataclass(frozen=True)
class ShownExample:
    """An example, and what is known of it."""

    example: TokenizedExample
    is_desirable: bool | None = None
    """Whether it is the better one of a pair, or marked as good; None without a mark."""
    num_cut: int = 0
    """Tokens cut off behind it."""
    columns: Mapping[str, Any] | None = None
    """Of a prompt: the columns of its row."""


@dataclass(frozen=True)
class FoundRow:
    """One row of the data and its examples."""

    examples: list[ShownExample]
    """What it trains, or would train if it were not left out; empty if it cannot be parsed."""
    left_out: Refusal | None
    """Why it is left out; None if it is not."""
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


def _prompt_note(run: Run) -> list[Text]:
    """What stands between question and answer, and what `model.template_args` change there."""
    model = run.recipe.model
    if not run.tokenizer.chat_template or run.recipe.train.stage in ("pretrain", "cpt"):
        return []
    note = f"between question and answer stands {_opening(run)}"
    if model.template_args:
        without = model.model_copy(update={"template_args": {}})
        plain = Run(run.recipe.model_copy(update={"model": without}))
        note += f"; without model.template_args {_opening(plain)}"
    return [Text(note)]


def _opening(run: Run) -> str:
    prompt = read_turn_marks(run.tokenizer).openings.get("user", "")
    return json.dumps(prompt, ensure_ascii=False)


def _show_first(run: Run, number: int, view: TokenView) -> Iterator[Text]:
    data, rows = run.recipe.data, first_rows(run, number)
    yield view.legend(has_worse=run.recipe.learns_from_pairs)
    yield from _prompt_note(run)
    for place, examples in enumerate(rows, start=1):
        if data.packing:
            yield view.packed_row(place, [it.example for it in examples], data.max_length)
        yield from _show(run, view, examples)


def _show_one(run: Run, place: str, view: TokenView) -> Iterator[Text]:
    row = one_row(run, place)
    if row.examples:
        yield view.legend(has_worse=run.recipe.learns_from_pairs)
        yield from _prompt_note(run)
    if row.left_out is not None:
        yield view.left_out(row.left_out.origin, row.left_out.reason)
    if not row.examples:
        yield Text(printable(row.raw))
    yield from _show(run, view, row.examples)


def mark_of(run: Run, shown: ShownExample) -> str:
    """Which answer of a pair it is, or how it is rated; empty without a mark."""
    if shown.is_desirable is None:
        return ""
    better, worse = ("good", "bad") if run.rules.rows == "ratings" else ("chosen", "rejected")
    return better if shown.is_desirable else worse


def _show(run: Run, view: TokenView, examples: Sequence[ShownExample]) -> Iterator[Text]:
    """The examples; the prompt of a pair is shown once."""
    before: TokenizedExample | None = None
    for it in examples:
        is_second = run.rules.rows == "pairs" and it.is_desirable is False and before is not None
        num_hidden = 0
        if is_second and before is not None:
            prompt = before.input_ids[: before.target_positions[0]]
            num_hidden = len(prompt) if it.example.input_ids[: len(prompt)] == prompt else 0
        yield view.example(
            it.example,
            it.num_cut,
            mark=mark_of(run, it),
            is_worse=it.is_desirable is False,
            num_hidden=num_hidden,
        )
        if it.columns is not None:
            yield _columns_for_rewards(it.columns, run.rules.needs)
        before = it.example


def _columns_for_rewards(columns: Mapping[str, Any], needs: Sequence[Need]) -> Text:
    """What the rewards read besides an answer."""
    names = list(dict.fromkeys(need.column for need in needs))
    if EVERY_COLUMN in names:
        names = list(columns)
    shown = [
        f"{name}: {json.dumps(columns[name], ensure_ascii=False, default=str)}"
        for name in names
        if name in columns
    ]
    return Text(printable("\n".join(["for the rewards:", *(shown or ["no column"])])))


def first_rows(run: Run, number: int) -> list[list[ShownExample]]:
    """The examples of the first token rows, in training order.

    Raises `YRunnerError` if training would refuse the data.
    """
    run.refuse_faulty_rows()
    rows = islice(_rows_in_order(run.plan()), number)
    train = run.dataset.train
    return [[shown for index in row for shown in _examples_of(train[index], run)] for row in rows]


def _examples_of(
    item: TokenizedExample | TokenizedPair | RatedExample | PromptRow, run: Run
) -> list[ShownExample]:
    """The examples of what the plan counts as one, with the tokens cut off behind each."""
    if isinstance(item, PromptRow):
        labels = [IGNORE_INDEX] * len(item.input_ids)
        example = TokenizedExample(item.input_ids, labels, item.origin)
        return [ShownExample(example, columns=item.columns)]
    examples: dict[bool | None, TokenizedExample]
    match item:
        case TokenizedPair():
            examples = {True: item.chosen, False: item.rejected}
        case RatedExample():
            examples = {item.is_desirable: item.example}
        case _:
            examples = {None: item}
    num_cut = _count_cut(examples, run)
    return [ShownExample(example, rating, num_cut[rating]) for rating, example in examples.items()]


def _count_cut(
    examples: Mapping[bool | None, TokenizedExample], run: Run
) -> dict[bool | None, int]:
    """Tokens of each answer of a row that were cut off, found by tokenizing the row again."""
    data = run.recipe.data
    lengths = {rating: len(example.input_ids) for rating, example in examples.items()}
    # Of a pair with one answer cut, the other has lost its end mark; KTO shows each alone.
    may_be_cut = max(lengths.values()) >= data.max_length or run.rules.rows == "ratings"
    if data.too_long != "cut" or not may_be_cut:
        return dict.fromkeys(lengths, 0)
    origin = next(iter(examples.values())).origin
    file, reading = find_file(str(origin.file), run.sources)
    row = find_row(file, reading, origin.row, run.rules)
    assert not isinstance(row, Refusal), "a prepared row can be read"
    whole = {talk.is_desirable: one for talk, one in zip(row, _tokenize(row, run), strict=True)}
    return {
        rating: len(one) - length
        for rating, length in lengths.items()
        if isinstance(one := whole[rating], TokenizedParts)
    }


def one_row(run: Run, place: str) -> FoundRow:
    """The row at a place such as `train.jsonl:12`, even if it is left out.

    Raises `YRunnerError` if there is no such row.
    """
    name, number = parse_place(place)
    file, reading = find_file(name, run.sources)
    rules = run.rules
    row = find_row(file, reading, number, rules)
    if isinstance(row, Refusal):
        return FoundRow([], row, raw_row(row.origin, reading))
    results = _tokenize(row, run)
    left_out = None
    try:
        pieces, _, _ = fit_row(row, results, rules, special_ids_of(run.tokenizer))
    except FaultyRow as fault:
        left_out = Refusal(row[0].origin, fault.kind, str(fault))
        pieces = [it.cut(0, rules.max_length) for it in results if isinstance(it, TokenizedParts)]
    if len(pieces) < len(row):  # an answer that cannot be rendered
        return FoundRow([], left_out, raw_row(row[0].origin, reading))
    if len(pieces) > len(row):
        return FoundRow([ShownExample(piece.example()) for piece in pieces], left_out, "")
    shown = [
        ShownExample(piece.example(), talk.is_desirable, len(whole) - len(piece), talk.columns)
        for piece, talk, whole in zip(pieces, row, results, strict=True)
        if isinstance(whole, TokenizedParts)
    ]
    return FoundRow(shown, left_out, "")


def _rows_in_order(plan: Plan) -> Iterator[tuple[int, ...]]:
    """The examples of each token row, once each, in the order of the first epoch."""
    num_micro_batches = plan.epoch_ends[0] * plan.num_micro_batches
    seen: set[tuple[int, ...]] = set()
    for micro_batch in islice(plan, num_micro_batches):
        for slices in micro_batch:
            row = tuple(plan.data_row(example) for example, _ in slices)
            if row not in seen:
                seen.add(row)
                yield row


def _tokenize(row: Answers, run: Run) -> list[TokenizedParts | FaultyRow]:
    """The conversations of a row before they are cut to data.max_length."""
    (results,) = tokenize_rows([row], run.tokenizer, run.rules)
    return results


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


def find_row(file: Path, reading: Reading, number: int, rules: Rules) -> Answers | Refusal:
    """The row with this number, or why it is refused.

    Raises `DataError` if the file has no such row.
    """
    rows, last = 0, 0
    for row in read_allowed(file, reading, rules, None).rows:
        origin = row.origin if isinstance(row, Refusal) else row[0].origin
        if origin.row == number:
            return row
        rows, last = rows + 1, origin.row
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
