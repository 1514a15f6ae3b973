"""The data files that a recipe names, wherever they are, and how it wants them read.

The data of a run, read and tokenized as its recipe says, and shown to the person.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from yrunner.console import print_table, progress, say
from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, FaultKind, TokenizedExample
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, check_conversations, prepare
from yrunner.data.dataset.row_report import KIND_WORDS, FileReport, Refusal
from yrunner.data.dataset.splits import Prepared
from yrunner.data.formats.formats import Reading, read_conversations
from yrunner.data.readers.files import find_files
from yrunner.data.readers.hub import hub_files
from yrunner.errors import Origin
from yrunner.recipe.schema.data import DataFile
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir


def recipe_sources(recipe: Recipe) -> list[Source]:
    """Training and validation data, folders and globs resolved, Hub datasets downloaded.

    Raises `DataError` where a place holds no data file.
    """
    return [
        *(_source(entry, "train") for entry in recipe.data.train),
        *(_source(entry, "validation") for entry in recipe.data.validation),
    ]


def keep_sources(recipe: Recipe) -> list[Source]:
    """The file of kept rows, where the recipe names one. Raises as `recipe_sources`."""
    file = getattr(recipe.keep, "file", None)
    return [] if file is None else [Source(tuple(find_files(file)))]


def recipe_rules(recipe: Recipe) -> Rules:
    """What the recipe makes of a row."""
    data = recipe.data
    return Rules(
        max_length=data.max_length,
        too_long=data.too_long,
        invalid=data.invalid,
        system=data.system,
        targets=data.targets,
        texts_allowed=recipe.train.stage != "sft",
    )


def data_name(entry: DataFile) -> str:
    """What a person calls this data: the file's name, or the dataset's."""
    return entry.hub or Path(entry.file or "").name


def _source(entry: DataFile, purpose: Literal["train", "validation"]) -> Source:
    if entry.hub is not None:
        files = hub_files(entry.hub, files=entry.files, revision=entry.revision)
    else:
        assert entry.file is not None, "the schema wants one of file and hub"
        files = find_files(entry.file)
    return Source(
        files=tuple(files),
        purpose=purpose,
        reading=Reading(entry.format, entry.columns, entry.document),
        take=entry.take,
        share=entry.share,
    )


BYTES_WORTH_A_BAR = 20_000_000
SHOWN_ROWS = 3


def prepare_data(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Tokenize the recipe's files, print the fate of their rows, and refuse what it refuses."""
    prepared = read_data(recipe, tokenizer)
    print_rows(recipe, prepared)
    finish_data(recipe, prepared)
    print_left_out(prepared)
    return prepared


def read_data(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Tokenize the recipe's files, or find them prepared; faulty rows are not judged yet."""
    sources = recipe_sources(recipe)
    cache = Cache(RunDir(recipe.run_folder).prepared)
    with _progress(sources) as advance:
        return prepare(
            sources, tokenizer, recipe_rules(recipe), cache, seed=recipe.seed, advance=advance
        )


def finish_data(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse what the recipe refuses, and set the validation rows aside."""
    data = recipe.data
    prepared.check(too_long=data.too_long, invalid=data.invalid)
    if data.validation_share is not None:
        prepared.set_validation_aside(data.validation_share, recipe.seed)


def print_rows(recipe: Recipe, prepared: Prepared) -> None:
    """Print what became of the rows of each file, and which files were found prepared."""
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
        f"files found prepared: {found:,} of {len(rows):,}, in "
        f"{RunDir(recipe.run_folder).prepared}; prepared anew: {len(rows) - found:,}"
    )


def print_left_out(prepared: Prepared) -> None:
    """Print which rows are not learned from, and which a person may want to look at."""
    refusals = [refusal for report in prepared.reports for refusal in report.refusals]
    kinds: dict[FaultKind, list[Refusal]] = {}
    for refusal in refusals:
        kinds.setdefault(refusal.kind, []).append(refusal)
    if kinds:
        rows = [
            (KIND_WORDS[kind], len(found), "\n".join(map(_short, found[:SHOWN_ROWS])))
            for kind, found in kinds.items()
        ]
        print_table("Left out", ("why", "rows", "the first"), rows)
    _print_shares(prepared.reports)
    if prepared.findings:
        rows = [
            (finding.what, finding.count, "\n".join(map(_place, finding.places[:SHOWN_ROWS])))
            for finding in prepared.findings
        ]
        print_table("Learned from, but worth a look", ("what", "rows", "the first"), rows)


def model_texts(recipe: Recipe) -> Iterator[str]:
    """Every text of the training files, for a tokenizer to be trained on."""
    for source in recipe_sources(recipe):
        if source.purpose == "train":
            for file in source.files:
                for row in read_conversations(file, source.reading).rows:
                    if isinstance(row, Conversation):
                        yield from (message.content for message in row.messages)


def first_examples(recipe: Recipe, tokenizer: Any, number: int) -> list[TokenizedExample]:
    """The first sound rows of the training data, tokenized."""
    source = recipe_sources(recipe)[0]
    rows = read_conversations(source.files[0], source.reading).rows
    talks = list(islice((row for row in rows if isinstance(row, Conversation)), number))
    results = tokenize_conversations(talks, tokenizer, system=recipe.data.system)
    return [result for result in results if isinstance(result, TokenizedExample)]


def check_rows(recipe: Recipe) -> None:
    """Refuse faulty rows as `prepare_data` does, as far as they are seen without a tokenizer."""
    sources = [*recipe_sources(recipe), *keep_sources(recipe)]
    check_conversations(sources, recipe_rules(recipe))


def _short(refusal: Refusal) -> str:
    return f"{_place(refusal.origin)}: {refusal.reason}"


def _place(origin: Origin) -> str:
    return f"{origin.file.name} row {origin.row}"


def _print_shares(reports: Sequence[FileReport]) -> None:
    not_taken = sum(report.not_taken for report in reports)
    if not_taken:
        say(f"{not_taken:,} examples are not taken (take, share)")
    set_aside = sum(report.set_aside for report in reports)
    if set_aside:
        say(f"{set_aside:,} examples are set aside for validation (data.validation_share)")


def _progress(
    sources: Sequence[Source],
) -> AbstractContextManager[Callable[[int], None] | None]:
    size = sum(file.stat().st_size for source in sources for file in source.files)
    return progress("reading data, bytes", size) if size > BYTES_WORTH_A_BAR else nullcontext()
