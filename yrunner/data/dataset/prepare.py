"""Prepare data files: read, tokenize and store their rows, or find them in the cache."""

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from operator import is_not
from pathlib import Path
from typing import Any, Literal

import numpy as np

from yrunner.data.chat.tokenize import TargetChoice, tokenize_chunks, tokenize_prompts, with_system
from yrunner.data.conversation import Answers, Conversation, FaultyRow, Note, TokenizedParts
from yrunner.data.dataset.cache import Cache, content_key, tokenizer_key
from yrunner.data.dataset.examples import (
    Examples,
    ExampleWriter,
    Pairs,
    RatedExamples,
    StoredFile,
    StoredRows,
)
from yrunner.data.dataset.prompts import Prompts, as_line
from yrunner.data.dataset.quality import count_scripts, traits_of
from yrunner.data.dataset.row_report import FileReport, Refusal, num_rows
from yrunner.data.dataset.splits import Prepared, stop_on
from yrunner.data.formats.columns import Need
from yrunner.data.formats.formats import ReadFile, Reading, read_conversations
from yrunner.data.formats.preference import has_end_by_hand, read_answers
from yrunner.data.formats.prompts import read_prompts
from yrunner.data.readers.text import Advance, states_of, unchanged
from yrunner.errors import DataError

ROWS_AT_ONCE = 2048
CHARACTERS_AT_ONCE = 2_000_000
"""Enough to keep all cores busy; their tokens, as Python ints, take about 100 MB."""
OBJECTS_BETWEEN_COLLECTIONS = 100_000


@dataclass(frozen=True)
class Source:
    """An entry of `data.train` or `data.validation`: its files, and how much of them to use."""

    files: tuple[Path, ...]
    purpose: Literal["train", "validation"] = "train"
    reading: Reading = field(default_factory=Reading)
    take: int | None = None
    """Number of examples to use, chosen at random; None for all."""
    share: float | None = None
    """Or the share of examples to use."""
    unused: tuple[Path, ...] = ()
    """Files of other splits beside its files, for the user to know."""


RowKind = Literal["examples", "pairs", "ratings", "prompts"]
"""What a row teaches: a conversation or text, a better and a worse answer, answers that are marked
good or bad, or what rewards say of answers to it."""

ROWS: Mapping[RowKind, type[StoredRows[Any]]] = {
    "examples": Examples,
    "pairs": Pairs,
    "ratings": RatedExamples,
    "prompts": Prompts,
}


@dataclass(frozen=True)
class Rules:
    """How rows become examples, and when a row is refused."""

    max_length: int
    too_long: Literal["refuse", "drop", "cut", "split"] = "refuse"
    invalid: Literal["refuse", "drop"] = "refuse"
    altered: Literal["refuse", "drop", "allow"] = "refuse"
    system: str | None = None
    targets: TargetChoice = "assistant"
    texts_allowed: bool = True
    rows: RowKind = "examples"
    needs: tuple[Need, ...] = ()
    """Columns of prompts that rewards read."""
    answer_length: int = 0
    """Tokens of `max_length` that are for the answer to a prompt."""


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    rules: Rules,
    cache: Cache,
    *,
    seed: int = 0,
    advance: Advance | None = None,
) -> Prepared[Any]:
    """Read and tokenize every source, or find it in the cache.

    `advance` counts the bytes of cached files, too. Raises `DataError` if a file cannot be read,
    and `ModelError` if the tokenizer or its chat template cannot be used. Invalid rows raise only
    in `Prepared.check`, after what became of every row can be shown.
    """
    kind = ROWS[rules.rows]
    prepared = Prepared(kind)
    options = _deciding_options(tokenizer, rules)
    for number, source in enumerate(sources):
        files = [
            _prepare_file(file, source, tokenizer, rules, cache, options, advance)
            for file in source.files
        ]
        chosen = _take(kind.of([stored for _, stored in files]), source, f"{seed} {number}")
        for index, (report, _) in enumerate(files):
            report.not_taken = report.examples - int((chosen.file_E == index).sum())
            prepared.reports.append(report)
        prepared.unused += [file for file in source.unused if file not in prepared.unused]
        prepared.add(source.purpose, chosen)
    return prepared


def check_conversations(sources: Sequence[Source], rules: Rules) -> None:
    """Raise what `Prepared.check` would for rows that are invalid with any tokenizer."""
    refusals = [
        row
        for source in sources
        for file in source.files
        for row in read_allowed(file, source.reading, rules, None).rows
        if isinstance(row, Refusal)
    ]
    stop_on(refusals, too_long=rules.too_long, invalid=rules.invalid, altered=rules.altered)


def _deciding_options(tokenizer: Any, rules: Rules) -> dict[str, Any]:
    """What the examples of a file depend on, besides its content and how it is read."""
    options = asdict(rules)
    for irrelevant in ("invalid", "texts_allowed"):
        del options[irrelevant]
    # "refuse" and "drop" make the same examples.
    options["too_long"] = rules.too_long if rules.too_long in ("cut", "split") else None
    options["altered"] = rules.altered == "allow"
    return options | {"tokenizer": tokenizer_key(tokenizer)}


def _prepare_file(
    file: Path,
    source: Source,
    tokenizer: Any,
    rules: Rules,
    cache: Cache,
    options: Mapping[str, Any],
    advance: Advance | None,
) -> tuple[FileReport, StoredFile]:
    states = states_of([file])
    key = content_key(file, **options, reading=asdict(source.reading))
    entry = cache.find(key)
    if entry is None:
        with cache.writing() as partial:
            # Otherwise an entry could hold the rows of other content than its key says.
            with unchanged(states):
                opened = read_allowed(file, source.reading, rules, advance)
                report = FileReport(
                    file, source.purpose, opened.format, list(opened.unread), list(opened.notes)
                )
                _write_examples(opened.rows, tokenizer, rules, partial, report)
            entry = cache.complete(key, partial, report.as_json())
    else:
        report = FileReport.from_json(cache.read_report(entry), file, source.purpose)
        _check_texts_allowed(file, report.format, rules)
        if advance is not None:
            advance(file.stat().st_size)
    return report, StoredFile(entry, file)


def _write_examples(
    rows: Iterator[Answers | Refusal],
    tokenizer: Any,
    rules: Rules,
    folder: Path,
    report: FileReport,
) -> None:
    """Tokenize the rows of a file into `folder`, and report what became of each."""
    writer = ExampleWriter(folder, len(tokenizer))
    special_ids = special_ids_of(tokenizer)
    rendered: deque[list[Answers]] = deque()

    def conversations() -> Iterator[list[Conversation]]:
        for chunk in _chunks(rows):
            report.rows += len(chunk)
            report.refusals += [row for row in chunk if isinstance(row, Refusal)]
            rendered.append([row for row in chunk if not isinstance(row, Refusal)])
            yield list(chain.from_iterable(rendered[-1]))

    try:
        with _rare_garbage_collection():
            for results in tokenize_rows(conversations(), tokenizer, rules):
                _write_chunk(rendered.popleft(), results, rules, writer, report, special_ids)
        writer.finish()
    finally:
        writer.close()
    report.refusals.sort(key=lambda refusal: refusal.origin)
    assert report.rows == report.kept + len(report.refusals), "a row has disappeared"


def tokenize_rows(
    chunks: Iterable[Sequence[Conversation]], tokenizer: Any, rules: Rules
) -> Iterator[list[TokenizedParts | FaultyRow]]:
    """Each conversation as tokens, before it is cut to `rules.max_length`, or its fault."""
    if rules.rows == "prompts":
        return tokenize_prompts(chunks, tokenizer, system=rules.system)
    return tokenize_chunks(chunks, tokenizer, system=rules.system, targets=rules.targets)


def _chunks(rows: Iterator[Answers | Refusal]) -> Iterator[list[Answers | Refusal]]:
    """Rows to tokenize together: many short ones or few long ones."""
    chunk: list[Answers | Refusal] = []
    num_characters = 0
    for row in rows:
        chunk.append(row)
        if not isinstance(row, Refusal):
            num_characters += sum(len(message.content) for talk in row for message in talk.messages)
        if len(chunk) == ROWS_AT_ONCE or num_characters > CHARACTERS_AT_ONCE:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Collect garbage less often.

    Rows make many lists and hardly a reference cycle, yet each collection visits the objects of all
    imported libraries: a sixth of the time of 20,000 rows.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _write_chunk(
    rows: Sequence[Answers],
    results: Sequence[TokenizedParts | FaultyRow],
    rules: Rules,
    writer: ExampleWriter,
    report: FileReport,
    special_ids: frozenset[int],
) -> None:
    kept: list[Conversation] = []
    examples: list[TokenizedParts] = []
    traits = []
    tokenized = iter(results)
    for row in rows:
        whole = list(islice(tokenized, len(row)))
        try:
            pieces, notes, shared = fit_row(row, whole, rules, special_ids)
        except FaultyRow as fault:
            report.refusals.append(Refusal(row[0].origin, fault.kind, str(fault)))
            continue
        report.kept += 1
        report.examples += len(pieces) // ROWS[rules.rows].EXAMPLES_EACH
        report.cut += len(pieces) == len(row) and any(map(is_not, pieces, whole))
        kept += row
        examples += pieces
        for number, piece in enumerate(pieces):
            # A conversation gives several pieces, or a row several conversations.
            talk, part = (row[0], number) if len(row) == 1 else (row[number], 0)
            found = traits_of(talk, part, piece.notes | notes)
            traits.append(replace(found, shared=shared))
    report.targets += writer.add(examples, traits)
    if rules.rows == "prompts":
        prompts = [(with_system(talk.messages, rules.system), talk.columns) for talk in kept]
        writer.add_lines([as_line(messages, columns) for messages, columns in prompts])
    report.tokens = writer.num_tokens
    texts = [message.content for talk in kept for message in talk.messages]
    report.scripts.update(count_scripts(texts))


def special_ids_of(tokenizer: Any) -> frozenset[int]:
    """The ids of special tokens, end marks among them."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, token in added if token.special}


FittedRow = tuple[list[TokenizedParts], frozenset[Note], int]
"""The examples of a row, notes on the row as a whole, and the tokens that its answers share."""


def fit_row(
    row: Answers,
    whole: Sequence[TokenizedParts | FaultyRow],
    rules: Rules,
    special_ids: frozenset[int],
) -> FittedRow:
    """What a row teaches, made of its tokenized conversations.

    Raises `FaultyRow` if it cannot be used.
    """
    fitted = [_fit_answer(talk, one, rules, row) for talk, one in zip(row, whole, strict=True)]
    if len(row) == 1:
        return fitted[0], frozenset(), 0
    return _fit_pair(row, [pieces[0] for pieces in fitted], whole, special_ids)


def _fit_answer(
    talk: Conversation, whole: TokenizedParts | FaultyRow, rules: Rules, row: Answers
) -> list[TokenizedParts]:
    try:
        if isinstance(whole, FaultyRow):
            raise whole
        return fit(whole, rules, is_text=talk.is_text)
    except FaultyRow as fault:
        if len(row) == 1:
            raise
        which = "better" if talk.is_desirable else "worse"
        raise FaultyRow(f"the {which} answer: {fault}", fault.kind) from fault


def _fit_pair(
    row: Answers,
    answers: Sequence[TokenizedParts],
    whole: Sequence[TokenizedParts | FaultyRow],
    special_ids: frozenset[int],
) -> FittedRow:
    """Two answers that differ; if one was cut, neither has an end mark."""
    notes: set[Note] = set()
    is_cut = [one is not before for one, before in zip(answers, whole, strict=True)]
    if any(is_cut) and not all(is_cut):
        notes.add("one_cut")
        answers = [
            one if cut else _without_end(one, special_ids)
            for one, cut in zip(answers, is_cut, strict=True)
        ]
    first, second = answers
    if first.parts == second.parts:
        where = f" in the first {len(first):,} tokens" if any(is_cut) else " once tokenized"
        raise FaultyRow(f"both answers are the same{where}", "equal_answers")
    if len({has_end_by_hand(talk) for talk in row}) == 2:
        notes.add("one_end")
    shared = len(first.parts[0]) if first.parts[0] == second.parts[0] else 0
    return list(answers), frozenset(notes), shared


def _without_end(answer: TokenizedParts, special_ids: frozenset[int]) -> TokenizedParts:
    """The answer without its end mark and what the template writes behind it."""
    last = max(number for number, part in enumerate(answer.parts) if number % 2 and part)
    if answer.parts[last][-1] not in special_ids:
        return answer
    shorter = answer.cut(0, sum(map(len, answer.parts[: last + 1])) - 1)
    if not shorter.has_targets:
        raise FaultyRow("one answer is cut, and the other has only an end mark", "no_targets")
    return shorter


def fit(example: TokenizedParts, rules: Rules, *, is_text: bool) -> list[TokenizedParts]:
    """The example, truncated or split to `rules.max_length`.

    Raises `FaultyRow` if it cannot be used.
    """
    if example.altered is not None and rules.altered != "allow":
        raise example.altered
    length = len(example)
    if rules.rows == "prompts":
        _check_room(length, rules)
        return [example]
    if length <= rules.max_length:
        pieces = [example]
    elif rules.too_long == "cut":
        pieces = [example.cut(0, rules.max_length)]
    elif rules.too_long == "split" and is_text:
        # A piece starts with the last token of the previous one: its first token is no target.
        starts = range(0, length - 1, rules.max_length - 1)
        pieces = [example.cut(start, start + rules.max_length) for start in starts]
    else:
        reason = f"has {length:,} tokens; data.max_length is {rules.max_length:,}"
        raise FaultyRow(reason, "too_long")
    if not any(piece.has_targets for piece in pieces):
        reason = "has no targets"
        if length > rules.max_length:
            reason += f" in the first {rules.max_length:,} of its {length:,} tokens"
        raise FaultyRow(reason, "no_targets")
    return pieces


def _check_room(length: int, rules: Rules) -> None:
    """Raise `FaultyRow` for a prompt that leaves too little room for an answer."""
    if length + rules.answer_length > rules.max_length:
        answer = f" and its answer up to {rules.answer_length:,}" * bool(rules.answer_length)
        reason = f"has {length:,} tokens{answer}; data.max_length is {rules.max_length:,}"
        raise FaultyRow(reason, "too_long")


def _take(rows: StoredRows[Any], source: Source, seed: str) -> StoredRows[Any]:
    """The number of rows that the source uses, in their order."""
    if source.take is None and source.share is None:
        return rows
    row_E = rows.row_E
    total = int(row_E[-1]) + 1 if len(row_E) else 0
    number = source.take or max(1, round(total * (source.share or 0)))
    if number > total:
        names = ", ".join(file.name for file in source.files[:3])
        raise DataError(
            source.files[0] if len(source.files) == 1 else Path(names),
            f"take is {number:,}, but only {num_rows(total)} can be used",
            remedy="lower take, or remove it to use all rows",
        )
    generator = np.random.default_rng([*seed.encode()])
    return rows.select(np.flatnonzero(np.isin(row_E, generator.permutation(total)[:number])))


def read_allowed(
    file: Path, reading: Reading, rules: Rules, advance: Advance | None
) -> ReadFile[Answers]:
    """Open a file as the rules say, and refuse plain texts if they do not allow them.

    Raises `DataError` as `read_conversations` and `read_answers` do.
    """
    if rules.rows == "prompts":
        return read_prompts(file, reading, rules.needs, advance)
    if rules.rows != "examples":
        return read_answers(file, reading, rated=rules.rows == "ratings", advance=advance)
    opened = read_conversations(file, reading, advance)
    _check_texts_allowed(file, opened.format, rules)
    rows = (row if isinstance(row, Refusal) else (row,) for row in opened.rows)
    return ReadFile(opened.format, opened.unread, opened.notes, rows)


def _check_texts_allowed(file: Path, format_name: str, rules: Rules) -> None:
    if format_name == "text" and not rules.texts_allowed:
        raise DataError(
            file,
            "has plain texts, which train.stage sft does not train on",
            remedy="set train.stage to cpt",
        )
