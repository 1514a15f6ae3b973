"""The fate of every row: kept, or left out for a reason that is written down."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yrunner.errors import Origin


@dataclass(frozen=True)
class Refusal:
    """A row that is not learned from."""

    origin: Origin
    kind: str
    """`invalid` or `too_long`: the key of the recipe that decides over it."""
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass
class FileReport:
    """What became of one file. `rows` is the sum of `kept` and the refusals."""

    file: Path
    purpose: str
    """`train` or `validation`."""
    format: str
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    targets: int = 0
    cut: int = 0
    """Rows that were cut to the longest length; they are among the kept ones."""
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def refused_by_kind(self) -> dict[str, int]:
        """Rows left out, counted by kind."""
        return dict(Counter(refusal.kind for refusal in self.refusals))


def as_json(reports: Iterable[FileReport]) -> dict[str, Any]:
    """The content of `data_report.json`."""
    files = [
        {
            "file": str(report.file),
            "purpose": report.purpose,
            "format": report.format,
            "rows": report.rows,
            "kept": report.kept,
            "cut": report.cut,
            "refused": report.refused_by_kind,
            "tokens": report.tokens,
            "targets": report.targets,
            "refusals": [
                {"row": refusal.origin.row, "kind": refusal.kind, "reason": refusal.reason}
                for refusal in report.refusals
            ],
        }
        for report in reports
    ]
    return {"files": files}
