"""Prepare data files: read, tokenize and store their rows, or find them in the cache."""

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from yrunner.data.chat.tokenize import TargetChoice, tokenize_chunks
from yrunner.data.conversation import Conversation, FaultyRow, TokenizedParts
from yrunner.data.dataset.cache import Cache, content_key, tokenizer_key
from yrunner.data.dataset.examples import Examples, ExampleWriter, StoredFile
from yrunner.data.dataset.quality import count_scripts, traits_of
from yrunner.data.dataset.row_report import FileReport, Refusal, num_rows
from yrunner.data.dataset.splits import Prepared, stop_on
from yrunner.data.formats.formats import ReadFile, Reading, read_conversations
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


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    rules: Rules,
    cache: Cache,
    *,
    seed: int = 0,
    advance: Advance | None = None,
) -> Prepared:
    """Read and tokenize every source, or find it in the cache.

    `advance` counts the bytes of cached files, too. Raises `DataError` if a file cannot be read,
    and `ModelError` if the tokenizer or its chat template cannot be used. Invalid rows raise only
    in `Prepared.check`, after what became of every row can be shown.
    """
    prepared = Prepared()
    options = _deciding_options(tokenizer, rules)
    for number, source in enumerate(sources):
        files = [
            _prepare_file(file, source, tokenizer, rules, cache, options, advance)
            for file in source.files
        ]
        chosen = _take(Examples.of([stored for _, stored in files]), source, f"{seed} {number}")
        for index, (report, stored) in enumerate(files):
            report.not_taken = len(stored) - int((chosen.file_E == index).sum())
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
        for row in _read_allowed(file, source.reading, rules, None).rows
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
                opened = _read_allowed(file, source.reading, rules, advance)
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
    rows: Iterator[Conversation | Refusal],
    tokenizer: Any,
    rules: Rules,
    folder: Path,
    report: FileReport,
) -> None:
    """Tokenize the rows of a file into `folder`, and report what became of each."""
    writer = ExampleWriter(folder, len(tokenizer))
    rendered: deque[list[Conversation]] = deque()

    def conversations() -> Iterator[list[Conversation]]:
        for chunk in _chunks(rows):
            report.rows += len(chunk)
            report.refusals += [row for row in chunk if isinstance(row, Refusal)]
            rendered.append([row for row in chunk if isinstance(row, Conversation)])
            yield rendered[-1]

    try:
        with _rare_garbage_collection():
            for results in tokenize_chunks(
                conversations(), tokenizer, system=rules.system, targets=rules.targets
            ):
                _write_chunk(rendered.popleft(), results, rules, writer, report)
        writer.finish()
    finally:
        writer.close()
    report.refusals.sort(key=lambda refusal: refusal.origin)
    assert report.rows == report.kept + len(report.refusals), "a row has disappeared"


def _chunks(rows: Iterator[Conversation | Refusal]) -> Iterator[list[Conversation | Refusal]]:
    """Rows to tokenize together: many short ones or few long ones."""
    chunk: list[Conversation | Refusal] = []
    num_characters = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Conversation):
            num_characters += sum(len(message.content) for message in row.messages)
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
    conversations: Sequence[Conversation],
    results: Sequence[TokenizedParts | FaultyRow],
    rules: Rules,
    writer: ExampleWriter,
    report: FileReport,
) -> None:
    kept: list[Conversation] = []
    examples: list[TokenizedParts] = []
    traits = []
    for conversation, result in zip(conversations, results, strict=True):
        try:
            if isinstance(result, FaultyRow):
                raise result
            pieces = fit(result, rules, is_text=conversation.is_text)
        except FaultyRow as fault:
            report.refusals.append(Refusal(conversation.origin, fault.kind, str(fault)))
            continue
        kept.append(conversation)
        examples += pieces
        traits += [traits_of(conversation, part, result.notes) for part in range(len(pieces))]
        report.cut += len(pieces) == 1 and pieces[0] is not result
    report.targets += writer.add(examples, traits)
    report.tokens = writer.num_tokens
    report.kept += len(kept)
    report.examples += len(examples)
    texts = [message.content for talk in kept for message in talk.messages]
    report.scripts.update(count_scripts(texts))


def fit(example: TokenizedParts, rules: Rules, *, is_text: bool) -> list[TokenizedParts]:
    """The example, truncated or split to `rules.max_length`.

    Raises `FaultyRow` if it cannot be used.
    """
    if example.altered is not None and rules.altered != "allow":
        raise example.altered
    length = len(example)
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


def _take(examples: Examples, source: Source, seed: str) -> Examples:
    """The number of examples that the source uses, in their order."""
    if source.take is None and source.share is None:
        return examples
    number = source.take or max(1, round(len(examples) * (source.share or 0)))
    if number > len(examples):
        names = ", ".join(file.name for file in source.files[:3])
        raise DataError(
            source.files[0] if len(source.files) == 1 else Path(names),
            f"take is {number:,}, but only {num_rows(len(examples))} can be used",
            remedy="lower take, or remove it to use all rows",
        )
    generator = np.random.default_rng([*seed.encode()])
    return examples.select(np.sort(generator.permutation(len(examples))[:number]))


def _read_allowed(file: Path, reading: Reading, rules: Rules, advance: Advance | None) -> ReadFile:
    """`read_conversations`, but refuse plain texts if the rules do not allow them."""
    opened = read_conversations(file, reading, advance)
    _check_texts_allowed(file, opened.format, rules)
    return opened


def _check_texts_allowed(file: Path, format_name: str, rules: Rules) -> None:
    if format_name == "text" and not rules.texts_allowed:
        raise DataError(
            file,
            "has plain texts, which train.stage sft does not train on",
            remedy="set train.stage to cpt",
        )
