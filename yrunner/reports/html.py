"""A report as one HTML file: it opens from disk, loads nothing and runs no script.

A report knows nothing about runs. A command fills the blocks below and writes them.

A page as one HTML file, from a template: what it is given stays text, and does no harm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from yrunner.console import Cell, format_cell, printable, reads_as_number
from yrunner.storage.run_dir import write_text


def render_page(template: str, **values: Any) -> str:
    """The whole page as text; `template` is the name of a file of this folder."""
    environment = Environment(
        loader=PackageLoader("yrunner", "reports"),
        autoescape=True,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = format_cell
    return environment.get_template(template).render(**values)


def _without_control_characters(value: Any) -> Any:
    """Make answers of a model harmless; what the template itself wrote is left alone."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@dataclass(frozen=True)
class Text:
    """Prose. An empty line separates paragraphs; a title begins a section."""

    body: str
    title: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be read as it stands, such as a recipe, folded under its title."""

    title: str
    body: str


@dataclass(frozen=True)
class KeyFigures:
    """Key figures as (label, value, note), for the top of a report: three to six read best."""

    figures: Sequence[tuple[str, Cell, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns of numbers are aligned to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture of `reports.drawing`. The SVG goes into the page as it is: never give it data."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model said before and after training; `None` where nobody judged it."""

    question: str
    reference: str
    before: str
    after: str
    before_is_right: bool | None = None
    after_is_right: bool | None = None

    @property
    def outcome(self) -> str:
        """What training did to this answer, in a word; empty when it was not judged."""
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
    """Answers side by side, folded to their questions; the first few lie open."""

    title: str
    rows: Sequence[Answer]
    caption: str = ""
    num_open: int = 3

    @property
    def outcomes(self) -> list[tuple[str, int]]:
        """How many answers had each outcome, in a fixed order, without those that none had."""
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
    """For each column, whether all its cells read as numbers."""
    columns = range(len(table.columns))
    cells = [[format_cell(value) for value in row] for row in table.rows]
    return [bool(cells) and all(reads_as_number(row[index]) for row in cells) for index in columns]
