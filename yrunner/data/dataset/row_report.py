"""What became of every row: kept, or refused for a reason."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yrunner.console import counted
from yrunner.data.conversation import FaultKind
from yrunner.data.dataset.quality import Finding
from yrunner.errors import Origin

SHOWN_REFUSALS = 10
OTHER_TEMPLATE = (
    "set model.chat_template to one that keeps the text, "
    "or put the thinking under reasoning_content if the template reads it"
)

KIND_WORDS: dict[FaultKind, str] = {
    "unreadable": "unreadable",
    "not_an_object": "not an object",
    "missing_field": "missing field",
    "wrong_type": "wrong type",
    "empty": "empty",
    "roles": "roles out of order",
    "characters": "unpaired surrogates",
    "template": "rejected by the chat template",
    "no_targets": "no targets",
    "too_long": "too long",
    "altered": "changed by the chat template",
    "thinking": "unbalanced thinking marks",
    "equal_answers": "both answers the same",
    "different_prompts": "different prompts",
}


@dataclass(frozen=True)
class Refusal:
    """A row that is not trained on."""

    origin: Origin
    kind: FaultKind
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"

    @property
    def key(self) -> str:
        """The key of the recipe's `data` section that says what to do with such a row."""
        if self.kind in ("altered", "thinking"):
            return "altered"
        return "too_long" if self.kind == "too_long" else "invalid"


def num_rows(number: int) -> str:
    """`1 row`, `2,000 rows`."""
    return counted(number, "row")


def describe_refusals(refusals: Sequence[Refusal], summary: str) -> str:
    """The first row of each reason, the number of rows that share it, and the summary.

    The summary comes last, so that a remedy can follow it.
    """
    alike: dict[tuple[Path, str], list[Refusal]] = {}
    for refusal in refusals:
        alike.setdefault((refusal.origin.file, refusal.reason), []).append(refusal)
    groups = list(alike.values())
    lines = []
    for first, *others in groups[:SHOWN_REFUSALS]:
        lines.append(f"{first}{f' (and {num_rows(len(others))} like it)' if others else ''}")
    num_hidden = sum(len(group) for group in groups[SHOWN_REFUSALS:])
    if num_hidden:
        lines.append(f"... and {num_rows(num_hidden)} more")
    return "\n".join([*lines, f"{summary} ({_counts(refusals)})"])


def _counts(refusals: Sequence[Refusal]) -> str:
    counts = Counter(refusal.kind for refusal in refusals)
    return ", ".join(f"{KIND_WORDS[kind]}: {number:,}" for kind, number in counts.most_common())


def refusal_remedy(refusals: Sequence[Refusal]) -> str:
    """What the user can do about these rows."""
    keys = {refusal.key for refusal in refusals}
    remedies = []
    if "invalid" in keys:
        remedies.append("fix the rows, or drop them with data.invalid: drop")
    if "altered" in keys:
        kinds = {refusal.kind for refusal in refusals}
        remedies += ["fix the thinking marks"] * ("thinking" in kinds)
        remedies += [OTHER_TEMPLATE] * ("altered" in kinds)
        remedies.append(
            "drop such rows with data.altered: drop, "
            "or train on what the template writes with data.altered: allow"
        )
    if "too_long" in keys:
        remedies.append(
            "raise data.max_length, or drop long rows with data.too_long: drop, "
            "or truncate them with data.too_long: cut"
        )
    return "; ".join(remedies)


@dataclass
class FileReport:
    """What became of the rows of one file: `rows` is `kept` plus the number of `refusals`."""

    file: Path
    purpose: str
    """`train` or `validation`."""
    format: str
    unread: list[str] = field(default_factory=list)
    """Columns of the file that its format does not read."""
    notes: list[str] = field(default_factory=list)
    """What is unusual about the file, such as the separator of its fields."""
    rows: int = 0
    kept: int = 0
    """Rows that can be trained on."""
    examples: int = 0
    """Examples made of the kept rows: more than rows if long texts are split."""
    cut: int = 0
    """Kept rows that were truncated to `data.max_length`."""
    not_taken: int = 0
    """Examples left out by `take` or `share`."""
    set_aside: int = 0
    """Examples moved to validation by `validation_share`."""
    tokens: int = 0
    targets: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    """Letters of each script in the kept rows."""
    refusals: list[Refusal] = field(default_factory=list)
    from_cache: bool = False
    """Whether the examples come from the cache."""

    @property
    def refused_by_kind(self) -> dict[str, int]:
        """Number of refused rows of each kind."""
        return dict(Counter(refusal.kind for refusal in self.refusals))

    def as_json(self) -> dict[str, Any]:
        """The content of a cache entry's report; `from_json` reads it."""
        own = ("file", "purpose", "refusals", "from_cache", "not_taken", "set_aside")
        content = {key: value for key, value in vars(self).items() if key not in own}
        rows = [[refusal.origin.row, refusal.kind, refusal.reason] for refusal in self.refusals]
        return content | {"refusals": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any], file: Path, purpose: str) -> "FileReport":
        """Read the result of `as_json`; the file may have another name now."""
        refusals = [
            Refusal(Origin(file, row), kind, reason) for row, kind, reason in content["refusals"]
        ]
        scripts = Counter(content["scripts"])
        read = content | {"refusals": refusals, "scripts": scripts}
        return cls(file=file, purpose=purpose, from_cache=True, **read)


def as_json(reports: Iterable[FileReport], findings: Sequence[Finding]) -> dict[str, Any]:
    """The reports and findings for `data_report.json`."""
    files = [
        {
            "file": str(report.file),
            "purpose": report.purpose,
            "format": report.format,
            "unread_columns": report.unread,
            "notes": report.notes,
            "rows": report.rows,
            "kept": report.kept,
            "cut": report.cut,
            "examples": report.examples,
            "not_taken": report.not_taken,
            "set_aside": report.set_aside,
            "refused": report.refused_by_kind,
            "tokens": report.tokens,
            "targets": report.targets,
            "scripts": dict(report.scripts),
            "refusals": [
                {"row": refusal.origin.row, "kind": refusal.kind, "reason": refusal.reason}
                for refusal in report.refusals
            ],
        }
        for report in reports
    ]
    return {
        "files": files,
        "findings": [
            {
                "what": finding.what,
                "remedy": finding.remedy,
                "count": finding.count,
                "first": [_place(it) for it in finding.places],
                **({"others": [_place(it) for it in finding.others]} if finding.others else {}),
            }
            for finding in findings
        ],
    }


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": str(origin.file), "row": origin.row}
