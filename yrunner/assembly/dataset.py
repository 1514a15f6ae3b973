"""The data files of a recipe and what happened to each row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal

from yrunner.console import counted, print_table, say
from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, FaultKind, TokenizedExample
from yrunner.data.dataset.prepare import RowKind, Rules, Source, read_allowed
from yrunner.data.dataset.quality import Finding
from yrunner.data.dataset.row_report import KIND_WORDS, FileReport, Refusal
from yrunner.data.dataset.splits import Prepared
from yrunner.data.formats.formats import Reading
from yrunner.data.readers.files import Found, find_files, split_of
from yrunner.data.readers.hub import hub_files
from yrunner.errors import Origin
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.data import DataFile, DataSection
from yrunner.recipe.schema.recipe import Recipe
from yrunner.rewards.make import needs_of
from yrunner.storage.run_dir import RunDir, SortDir, read_json

BYTES_WORTH_A_BAR = 20_000_000
SHOWN_ROWS = 3
SHOWN_FILES = 5


def find_sources(data: DataSection) -> list[Source]:
    """Training and validation data: folders and globs resolved, Hub datasets downloaded.

    Raises `DataError` if a folder or a pattern has no data file.
    """
    return [
        *(source for entry in data.train for source in _sources(entry)),
        *(_source(entry, "validation") for entry in data.validation),
    ]


def _sources(entry: DataFile) -> list[Source]:
    """The training data of an entry: sorted rows as far as there are any, else those to sort."""
    if entry.sorted is None:
        return [_source(entry, "train")]
    sorting = load_recipe(entry.sorted)
    unsorted = [source for source in find_sources(sorting.data) if source.purpose == "train"]
    done = SortDir.finished(RunDir(sorting.run_folder).sort)
    if done is None:
        return [replace(source, take=entry.take, share=entry.share) for source in unsorted]
    first = unsorted[0]
    report = read_json(done.data_report) if done.data_report.exists() else {"files": []}
    formats = {file["format"] for file in report["files"] if file["purpose"] == "train"}
    # Sorted rows may begin with others than their files, so the format is not detected again.
    known = formats.pop() if len(formats) == 1 else first.reading.format
    reading = replace(first.reading, format=known)
    return [Source((done.sorted,), reading=reading, take=entry.take, share=entry.share)]


def keep_sources(recipe: Recipe) -> list[Source]:
    """The file of `keep`, if the recipe names one. Raises as `find_sources` does."""
    file = getattr(recipe.keep, "file", None)
    return [] if file is None else [Source(find_files(file).files)]


def _source(entry: DataFile, purpose: Literal["train", "validation"]) -> Source:
    if entry.hub is not None:
        found = Found(tuple(hub_files(entry.hub, files=entry.files, revision=entry.revision)))
    else:
        assert entry.file is not None, "the schema requires file or hub"
        found = find_files(entry.file, purpose)
    return Source(
        files=found.files,
        purpose=purpose,
        reading=Reading(entry.format, entry.columns, entry.document),
        take=entry.take,
        share=entry.share,
        unused=found.others,
    )


def rules_of(recipe: Recipe) -> Rules:
    """The recipe's rules for rows."""
    data = recipe.data
    return Rules(
        max_length=data.max_length,
        too_long=data.too_long,
        invalid=data.invalid,
        altered=data.altered,
        system=data.system,
        targets=data.targets,
        texts_allowed=recipe.train.stage != "sft",
        rows=row_kind_of(recipe),
        needs=needs_of(recipe.rewards),
        answer_length=recipe.rollout.max_new_tokens if recipe.train.stage == "rl" else 0,
    )


def row_kind_of(recipe: Recipe) -> RowKind:
    """What the rows of the recipe teach."""
    if recipe.train.stage == "rl":
        return "prompts"
    if not recipe.learns_from_pairs:
        return "examples"
    return "ratings" if recipe.loss.kind == "kto" else "pairs"


def unit_of(recipe: Recipe) -> str:
    """What a run learns from, as a word: what its batch size counts."""
    if recipe.data.packing:
        return "packed row"
    words: dict[RowKind, str] = {
        "examples": "example",
        "pairs": "pair",
        "ratings": "answer",
        "prompts": "answer",
    }
    return words[row_kind_of(recipe)]


def data_name(entry: DataFile) -> str:
    """The name of the file, of the dataset on the Hub, or of the recipe that sorts."""
    if entry.sorted is not None:
        return f"{entry.sorted.name}, sorted"
    return entry.hub or Path(entry.file or "").name


def conversations_of(sources: Iterable[Source], rules: Rules) -> Iterator[Conversation]:
    """The valid rows of the files, in order, without bad answers."""
    for source in sources:
        for file in source.files:
            for row in read_allowed(file, source.reading, rules, None).rows:
                if not isinstance(row, Refusal):
                    yield from (talk for talk in row if talk.is_desirable is not False)


def first_examples(
    source: Source, tokenizer: Any, number: int, rules: Rules
) -> list[TokenizedExample]:
    """The first valid rows of the first file, tokenized."""
    first = replace(source, files=source.files[:1])
    conversations = list(islice(conversations_of([first], rules), number))
    results = tokenize_conversations(conversations, tokenizer, system=rules.system)
    return [result for result in results if isinstance(result, TokenizedExample)]


def texts_of(sources: Iterable[Source], rules: Rules) -> Iterator[str]:
    """Every text of the files, to train a tokenizer on."""
    for row in conversations_of(sources, rules):
        yield from (message.content for message in row.messages)


def print_rows(prepared: Prepared[Any], cache: Path) -> None:
    """Print row counts and unread columns per file, and how many files were found in `cache`."""
    columns = ("file", "for", "format", "rows", "kept", "cut", "left out", "tokens", "targets")
    rows = [
        (
            report.file.name,
            report.purpose,
            report.format,
            report.rows,
            report.kept,
            report.cut,
            len(report.refusals),
            report.tokens,
            report.targets,
        )
        for report in prepared.reports
    ]
    print_table("Data", columns, rows)
    found = sum(report.from_cache for report in prepared.reports)
    say(
        f"files found in the cache: {found:,} of {len(rows):,}, in "
        f"{cache}; tokenized now: {len(rows) - found:,}"
    )
    unread: dict[str, list[str]] = {}
    for report in prepared.reports:
        if report.unread:
            unread.setdefault(", ".join(report.unread), []).append(report.file.name)
    for columns_of_files, (first, *others) in unread.items():
        alike = f" and {len(others):,} more" if others else ""
        say(f"{first}{alike}: unused columns: {columns_of_files}")
    for report in prepared.reports:
        for note in report.notes:
            say(f"{report.file.name}: {note}")
    _print_unused(prepared)


def _print_unused(prepared: Prepared[Any]) -> None:
    """Print which files are of other splits, and how to validate on them."""
    read = {report.file for report in prepared.reports}
    unused = [file for file in prepared.unused if file not in read]
    if not unused:
        return
    names = ", ".join(file.name for file in unused[:SHOWN_FILES])
    if len(unused) > SHOWN_FILES:
        names += f" and {len(unused) - SHOWN_FILES:,} more"
    say(f"files of other splits, not used: {names}")
    validates = any(report.purpose == "validation" for report in prepared.reports)
    held_out = [file for file in unused if split_of(Path(file.parent.name, file.name)) != "test"]
    if held_out and not validates:
        place = commonpath(held_out)
        say(f"  to validate on {held_out[0].name}, add to data: validation: [{{file: {place}}}]")


def print_left_out(prepared: Prepared[Any]) -> None:
    """Print which rows are left out, and which may need a look."""
    refusals = [refusal for report in prepared.reports for refusal in report.refusals]
    kinds: dict[FaultKind, list[Refusal]] = {}
    for refusal in refusals:
        kinds.setdefault(refusal.kind, []).append(refusal)
    if kinds:
        rows = [
            (KIND_WORDS[kind], len(found), "\n".join(map(_short, found[:SHOWN_ROWS])))
            for kind, found in kinds.items()
        ]
        print_table("Left out", ("why", "rows", "first rows"), rows)
    _print_shares(prepared.reports)
    if prepared.findings:
        rows = [
            (
                _with_remedy(finding),
                finding.count,
                "\n".join(_places(finding)[:SHOWN_ROWS]),
            )
            for finding in prepared.findings
        ]
        print_table("Trained on, but worth a look", ("what", "rows", "first rows"), rows)


def _with_remedy(finding: Finding) -> str:
    return f"{finding.what}; {finding.remedy}" if finding.remedy else finding.what


def _places(finding: Finding) -> list[str]:
    """The first rows, each with the one that it repeats or contradicts."""
    places = list(map(_place, finding.places))
    if not finding.others:
        return places
    others = map(_place, finding.others)
    return [f"{place} and {other}" for place, other in zip(places, others, strict=True)]


def _short(refusal: Refusal) -> str:
    return f"{_place(refusal.origin)}: {refusal.reason}"


def _place(origin: Origin) -> str:
    return f"{origin.file.name} row {origin.row}"


def _print_shares(reports: Sequence[FileReport]) -> None:
    not_taken = sum(report.not_taken for report in reports)
    if not_taken:
        say(f"{counted(not_taken, 'example')} skipped (take, share)")
    set_aside = sum(report.set_aside for report in reports)
    if set_aside:
        aside = counted(set_aside, "example")
        say(f"{aside} set aside for validation (data.validation_share)")
