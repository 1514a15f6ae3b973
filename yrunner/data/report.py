"""The fate of every row: kept, or left out for a reason that is written down."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yrunner.data.findings import Finding
from yrunner.data.refusals import Refusal
from yrunner.errors import Origin


@dataclass
class FileReport:
    """What became of one file. `rows` is the sum of `kept` and the refusals."""

    file: Path
    purpose: str
    """`train` or `validation`."""
    format: str
    unread: list[str] = field(default_factory=list)
    """Columns of the file that say nothing in this format."""
    rows: int = 0
    kept: int = 0
    """Rows that can be learned from."""
    examples: int = 0
    """Examples that they make: more than rows where long texts are split."""
    cut: int = 0
    """Rows that were cut to the longest length; they are among the kept ones."""
    not_taken: int = 0
    """Examples that `take` or `share` leaves out."""
    set_aside: int = 0
    """Examples that `validation_share` moves to validation."""
    tokens: int = 0
    targets: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    """Letters of each script in what is kept."""
    refusals: list[Refusal] = field(default_factory=list)
    from_cache: bool = False
    """Whether the file had been prepared before."""

    @property
    def refused_by_kind(self) -> dict[str, int]:
        """Rows left out, counted by kind."""
        return dict(Counter(refusal.kind for refusal in self.refusals))

    def as_json(self) -> dict[str, Any]:
        """Everything but what `from_json` is told again."""
        own = ("file", "purpose", "refusals", "from_cache", "not_taken", "set_aside")
        content = {key: value for key, value in vars(self).items() if key not in own}
        rows = [[refusal.origin.row, refusal.kind, refusal.reason] for refusal in self.refusals]
        return content | {"refusals": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any], file: Path, purpose: str) -> "FileReport":
        """Read what `as_json` gave; the same content may stand in a file of another name."""
        refusals = [
            Refusal(Origin(file, row), kind, reason) for row, kind, reason in content["refusals"]
        ]
        scripts = Counter(content["scripts"])
        read = content | {"refusals": refusals, "scripts": scripts}
        return cls(file=file, purpose=purpose, from_cache=True, **read)


def as_json(reports: Iterable[FileReport], findings: Sequence[Finding]) -> dict[str, Any]:
    """The content of `data_report.json`."""
    files = [
        {
            "file": str(report.file),
            "purpose": report.purpose,
            "format": report.format,
            "unread_columns": report.unread,
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
                "count": finding.count,
                "first": [{"file": str(it.file), "row": it.row} for it in finding.places],
            }
            for finding in findings
        ],
    }
