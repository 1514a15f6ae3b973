"""The data of a run, read and tokenized as its recipe says, and shown to the person."""

from collections.abc import Iterator, Sequence
from typing import Any

from yrunner.console import print_table, say
from yrunner.data.conversation import Conversation, TokenizedExample
from yrunner.data.pipeline import (
    Prepared,
    Rules,
    Source,
    check_conversations,
    prepare,
    read_conversations,
)
from yrunner.data.render import tokenize_conversations
from yrunner.data.report import FileReport
from yrunner.recipe.schema import Recipe


def prepare_data(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Tokenize the recipe's files, print the fate of their rows, and refuse what it refuses."""
    data, rules = recipe.data, _rules(recipe)
    prepared = prepare(_sources(recipe), tokenizer, rules)
    _print_rows(prepared.reports)
    prepared.check(rules)
    _print_left_out(prepared.reports)
    if data.validation_share is not None:
        prepared.set_validation_aside(data.validation_share, recipe.seed)
        say(f"{len(prepared.validation):,} rows are set aside for validation")
    return prepared


def model_texts(recipe: Recipe) -> Iterator[str]:
    """Every text of the training files, for a tokenizer to be trained on."""
    for source in _sources(recipe):
        if source.purpose == "train":
            for row in read_conversations(source)[1]:
                if isinstance(row, Conversation):
                    yield from (message.content for message in row.messages)


def first_examples(recipe: Recipe, tokenizer: Any, number: int) -> list[TokenizedExample]:
    """The first sound rows of the training data, tokenized."""
    rows = read_conversations(_sources(recipe)[0])[1]
    talks = [row for row in rows if isinstance(row, Conversation)][:number]
    results = tokenize_conversations(talks, tokenizer, system=recipe.data.system)
    return [result for result in results if isinstance(result, TokenizedExample)]


def check_rows(recipe: Recipe) -> None:
    """Refuse faulty rows as `prepare_data` does, as far as they are seen without a tokenizer."""
    check_conversations(_sources(recipe), _rules(recipe))


def _rules(recipe: Recipe) -> Rules:
    data = recipe.data
    return Rules(
        max_length=data.max_length,
        too_long=data.too_long,
        invalid=data.invalid,
        system=data.system,
        targets=data.targets,
        texts_allowed=recipe.train.stage != "sft",
    )


def _sources(recipe: Recipe) -> list[Source]:
    data = recipe.data
    return [
        *(Source(file.file, "train", file.format, file.columns) for file in data.train),
        *(Source(file.file, "validation", file.format, file.columns) for file in data.validation),
    ]


def _print_rows(reports: Sequence[FileReport]) -> None:
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
        for report in reports
    ]
    print_table("Data", columns, rows)


def _print_left_out(reports: Sequence[FileReport]) -> None:
    for report in reports:
        for refusal in report.refusals[:3]:
            say(f"left out: {refusal}")
        if len(report.refusals) > 3:
            say(f"left out: {len(report.refusals) - 3:,} more rows of {report.file.name}")
