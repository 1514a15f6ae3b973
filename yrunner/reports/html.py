"""Render pages as single HTML files, and reports from blocks that commands fill.

A page opens from disk and loads nothing. Values are escaped, and only its own script may run.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from yrunner.console import Cell, format_cell, printable, reads_as_number
from yrunner.storage.run_dir import write_text


def render_page(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """The whole page as text; `template` and `scripts` are names of files in this folder.

    The scripts become one, allowed by its hash: a browser runs no other, whatever the data holds.
    """
    folder = files("yrunner.reports")
    script = "\n".join(folder.joinpath(name).read_text("utf-8") for name in scripts)
    digest = hashlib.sha256(script.encode()).digest()
    page = _environment().get_template(template)
    script_hash = base64.b64encode(digest).decode()
    return page.render(script=Markup(script), script_hash=script_hash, **values)


@cache
def _environment() -> Environment:
    """The same for all pages, because it keeps the templates that it has compiled."""
    environment = Environment(
        loader=PackageLoader("yrunner", "reports"),
        autoescape=True,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = format_cell
    return environment


def _without_control_characters(value: Any) -> Any:
    """Make control characters of data visible; markup of the template is left alone."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def four_digits(value: float) -> float | None:
    """To four significant digits; None for NaN and infinity, which JSON cannot hold."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Text:
    """Prose; empty lines separate paragraphs."""

    body: str
    title: str = ""


@dataclass(frozen=True)
class Code:
    """Preformatted text, such as a recipe, folded under its title."""

    title: str
    body: str


@dataclass(frozen=True)
class KeyFigures:
    """Key figures as (label, value, note), for the top of a report: three to six read best."""

    figures: Sequence[tuple[str, Cell, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns of numbers are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """An SVG of `reports.svg`. It goes into the page unescaped: never give it data."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """The model's answers before and after training; `None` where they were not scored."""

    question: str
    reference: str
    before: str
    after: str
    before_is_right: bool | None = None
    after_is_right: bool | None = None

    @property
    def outcome(self) -> str:
        """What training did to this answer, in a word; empty where it was not scored."""
        return _OUTCOMES.get((self.before_is_right, self.after_is_right), "")


_OUTCOMES: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "learnt",
    (True, False): "lost",
    (True, True): "kept",
    (False, False): "still wrong",
    (None, True): "right",
    (None, False): "wrong",
}


@dataclass(frozen=True)
class Answers:
    """Answers side by side, folded to their questions; the first few are open."""

    title: str
    rows: Sequence[Answer]
    caption: str = ""
    num_open: int = 3

    @property
    def outcomes(self) -> list[tuple[str, int]]:
        """Number of answers by outcome, in a fixed order, without zeros."""
        found = [row.outcome for row in self.rows]
        return [(word, found.count(word)) for word in _OUTCOMES.values() if word in found]


Block = Text | Code | KeyFigures | Table | Plot | Answers


@dataclass(frozen=True)
class Report:
    """A title and the blocks below it, in the order in which they are read."""

    title: str
    blocks: Sequence[Block]
    subtitle: str = ""


def write_report(report: Report, path: Path) -> None:
    """Write the report; the file appears under its name only when it is complete."""
    write_text(path, render_report(report))


def render_report(report: Report) -> str:
    """The whole page as text."""
    return render_page(
        "report.html.jinja",
        report=report,
        kind=lambda block: type(block).__name__,
        numeric_columns=_numeric_columns,
        drawing=lambda plot: Markup(plot.svg),
    )


def _numeric_columns(table: Table) -> list[bool]:
    """For each column, whether all cells read as numbers."""
    columns = range(len(table.columns))
    cells = [[format_cell(value) for value in row] for row in table.rows]
    return [bool(cells) and all(reads_as_number(row[index]) for row in cells) for index in columns]
