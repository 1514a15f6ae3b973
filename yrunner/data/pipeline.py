"""From data files to tokenized examples, with the fate of every row."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from yrunner.data.conversation import Conversation, FaultyRow, TokenizedExample
from yrunner.data.files import Damaged, Row, read_rows
from yrunner.data.formats import detect_format, known_columns, read_row
from yrunner.data.render import Targets, tokenize_conversations
from yrunner.data.report import FileReport, Refusal
from yrunner.errors import DataError, YRunnerError
from yrunner.tokens import IGNORE_INDEX

ROWS_AT_ONCE = 1000
ROWS_TO_DETECT = 100
SHOWN_REFUSALS = 10

Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """One data file and how to read it."""

    file: Path
    purpose: Literal["train", "validation"] = "train"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What makes an example of a row, and when a row is refused."""

    max_length: int
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    invalid: Literal["refuse", "drop"] = "refuse"
    system: str | None = None
    targets: Targets = "assistant"
    texts_allowed: bool = True


def read_conversations(
    source: Source,
) -> tuple[str, Iterator[Conversation | Refusal]]:
    """The format of a file, and each of its rows as a conversation or as a refusal."""
    rows = list(read_rows(source.file))
    if not rows:
        raise DataError(source.file, "holds no rows", remedy="remove it from the recipe")
    format_name = _format_of(rows, source)
    return format_name, _conversations(rows, format_name, source.columns)


@dataclass
class Prepared:
    """Everything that a run learns from, is watched on, and left out."""

    train: list[TokenizedExample] = field(default_factory=list)
    validation: list[TokenizedExample] = field(default_factory=list)
    reports: list[FileReport] = field(default_factory=list)

    def set_validation_aside(self, share: float, seed: int) -> None:
        """Move a random share of the training examples to validation, at least one of each.

        Raises `YRunnerError` where there are fewer than two.
        """
        if len(self.train) < 2:
            raise YRunnerError(
                "data.validation_share needs two rows or more, one to learn from and one to "
                f"validate on; there is {len(self.train)}",
                remedy="add rows, or remove data.validation_share",
            )
        number = min(max(1, round(len(self.train) * share)), len(self.train) - 1)
        chosen = set(random.Random(seed).sample(range(len(self.train)), number))
        self.validation += [self.train[index] for index in sorted(chosen)]
        self.train = [row for index, row in enumerate(self.train) if index not in chosen]

    def check(self, rules: Rules) -> None:
        """Raise `YRunnerError` with the counts and the first faulty rows where the rules stop the
        run, or where nothing is left to learn from or to validate on.
        """
        _stop_on([row for report in self.reports for row in report.refusals], rules)
        self._check_something_is_left("train", self.train, "to learn from")
        self._check_something_is_left("validation", self.validation, "to validate on")

    def _check_something_is_left(
        self, purpose: str, examples: Sequence[TokenizedExample], use: str
    ) -> None:
        reports = [report for report in self.reports if report.purpose == purpose]
        if examples or not reports:
            return
        refusals = [row for report in reports for row in report.refusals]
        too_long = any(refusal.kind == "too_long" for refusal in refusals)
        raise YRunnerError(
            _refusal_lines(refusals, f"no row is left {use}"),
            remedy="mend the rows, or raise data.max_length" if too_long else "mend the rows",
        )


def prepare(sources: Sequence[Source], tokenizer: Any, rules: Rules) -> Prepared:
    """Read and tokenize every source.

    Raises `DataError` where a file cannot be read, and `ModelError` where the tokenizer or its
    chat template is of no use. Faulty rows raise nothing before `Prepared.check`, so that the fate
    of every row can be shown first.
    """
    prepared = Prepared()
    for source in sources:
        report, examples = _prepare_file(source, tokenizer, rules)
        prepared.reports.append(report)
        (prepared.train if source.purpose == "train" else prepared.validation).extend(examples)
    return prepared


def check_conversations(sources: Sequence[Source], rules: Rules) -> None:
    """Raise what `prepare` and `Prepared.check` would for rows that no tokenizer could save."""
    rows = [row for source in sources for row in _read_allowed(source, rules)[1]]
    _stop_on([row for row in rows if isinstance(row, Refusal)], rules)


def _stop_on(refusals: Sequence[Refusal], rules: Rules) -> None:
    """Raise `YRunnerError` where the rules stop the run for one of these rows."""
    kinds = [kind for kind in ("invalid", "too_long") if getattr(rules, kind) == "refuse"]
    stopping = [refusal for refusal in refusals if refusal.kind in kinds]
    if stopping:
        raise YRunnerError(
            _refusal_lines(stopping, f"{_num_rows(len(stopping))} cannot be learned from"),
            remedy=_refusal_remedy({refusal.kind for refusal in stopping}),
        )


def _num_rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _refusal_lines(refusals: Sequence[Refusal], summary: str) -> str:
    """The first row of each reason with the number of rows that share it, and the summary.

    It stands last, because the remedy follows it.
    """
    alike: dict[tuple[Path, str], list[Refusal]] = {}
    for refusal in refusals:
        alike.setdefault((refusal.origin.file, refusal.reason), []).append(refusal)
    groups = list(alike.values())
    lines = []
    for first, *others in groups[:SHOWN_REFUSALS]:
        lines.append(f"{first}{f' (and {_num_rows(len(others))} more like it)' if others else ''}")
    num_hidden = sum(len(group) for group in groups[SHOWN_REFUSALS:])
    if num_hidden:
        lines.append(f"... and {_num_rows(num_hidden)} more")
    return "\n".join([*lines, summary])


def _refusal_remedy(kinds: set[str]) -> str:
    remedies = []
    if "invalid" in kinds:
        remedies.append("mend the rows, or leave them out with data.invalid: drop")
    if "too_long" in kinds:
        remedies.append(
            "raise data.max_length, or leave long rows out with data.too_long: drop, "
            "or cut their ends off with data.too_long: cut"
        )
    return "; ".join(remedies)


def _format_of(rows: Sequence[Row], source: Source) -> str:
    """The format of a file. Raises `DataError` where none fits, or not with these columns."""
    format_name = _detect(rows, source) if source.format == "auto" else source.format
    known = known_columns(format_name)
    unknown = [name for name in source.columns if name not in known]
    if unknown:
        raise DataError(
            source.file,
            f'columns has "{unknown[0]}", but the format {format_name} has {", ".join(known)}',
            remedy="write columns as the format's name: the file's name",
        )
    return format_name


def _detect(rows: Sequence[Row], source: Source) -> str:
    origin, first = rows[0]
    if isinstance(first, Damaged) and all(isinstance(row, Damaged) for _, row in rows):
        raise DataError(
            origin, str(first), remedy="no other row of the file can be read either; mend it"
        )
    try:
        return detect_format([row for _, row in rows[:ROWS_TO_DETECT]], source.columns)
    except FaultyRow as fault:
        raise DataError(
            source.file,
            str(fault),
            remedy="set its format in the recipe, or name its columns as in "
            "columns: {instruction: question, output: answer}",
        ) from fault


def _conversations(
    rows: Sequence[Row], format_name: str, columns: Mapping[str, str]
) -> Iterator[Conversation | Refusal]:
    for origin, row in rows:
        if isinstance(row, Damaged):
            yield Refusal(origin, "invalid", str(row))
            continue
        try:
            yield Conversation(read_row(row, format_name, columns), origin)
        except FaultyRow as fault:
            yield Refusal(origin, "invalid", str(fault))


def _read_allowed(source: Source, rules: Rules) -> tuple[str, Iterator[Conversation | Refusal]]:
    """`read_conversations`, but for files of texts where the rules do not allow them."""
    format_name, rows = read_conversations(source)
    if format_name == "text" and not rules.texts_allowed:
        raise DataError(
            source.file,
            "holds plain texts, which train.stage sft does not learn from",
            remedy="set train.stage to cpt",
        )
    return format_name, rows


def _prepare_file(
    source: Source, tokenizer: Any, rules: Rules
) -> tuple[FileReport, list[TokenizedExample]]:
    format_name, rows = _read_allowed(source, rules)
    report = FileReport(source.file, source.purpose, format_name)
    kept: list[TokenizedExample] = []
    for chunk in _chunks(rows, ROWS_AT_ONCE):
        report.rows += len(chunk)
        report.refusals += [row for row in chunk if isinstance(row, Refusal)]
        conversations = [row for row in chunk if isinstance(row, Conversation)]
        results = tokenize_conversations(
            conversations, tokenizer, system=rules.system, targets=rules.targets
        )
        for conversation, result in zip(conversations, results, strict=True):
            if isinstance(result, FaultyRow):
                report.refusals.append(Refusal(conversation.origin, "invalid", str(result)))
            elif (example := _fit(result, rules, report)) is not None:
                kept.append(example)
    report.kept = len(kept)
    report.tokens = sum(len(example.input_ids) for example in kept)
    report.targets = sum(len(example.target_positions) for example in kept)
    report.refusals.sort(key=lambda refusal: refusal.origin)
    assert report.rows == report.kept + len(report.refusals), "a row has disappeared"
    return report, kept


def _fit(example: TokenizedExample, rules: Rules, report: FileReport) -> TokenizedExample | None:
    """The example within the longest length; None, and a refusal, where it cannot be used."""
    length = len(example.input_ids)
    if length > rules.max_length:
        if rules.too_long != "cut":
            reason = f"has {length:,} tokens, data.max_length is {rules.max_length:,}"
            report.refusals.append(Refusal(example.origin, "too_long", reason))
            return None
        ids, labels = example.input_ids[: rules.max_length], example.labels[: rules.max_length]
        example = TokenizedExample(ids, labels, example.origin)
    if all(label == IGNORE_INDEX for label in example.labels):
        reason = "no token is left to learn"
        if length > rules.max_length:
            reason += f" of its {length:,} when it is cut to data.max_length {rules.max_length:,}"
        report.refusals.append(Refusal(example.origin, "invalid", reason))
        return None
    report.cut += length > rules.max_length
    return example


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk
