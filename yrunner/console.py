"""All printing: lines, errors, tables and progress, on a terminal or into a log.

Rich is imported only where it is needed: `yrun --help` must answer in a third of a second.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Cell = str | int | float | None
"""One value in a table; `None` means not measured."""

# Characters that can move the cursor, colour the screen, reverse the reading direction or break the
# encoding: control characters except tab and line feed, direction overrides, lone surrogates.
_HARMFUL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FIGURE = r"[+\-−]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?"
_SPREAD = rf" ?± ?{_FIGURE}|\sto\s{_FIGURE}(\s\*)?"
_NUMBER = re.compile(rf"{_FIGURE}({_SPREAD})?( ?[%\w/]{{1,10}})?", re.IGNORECASE)
_NO_NUMBER = {"", "–", "nan", "inf", "-inf"}

# A log is as wide as its tables: a truncated number is worse than a long line.
_LOG_WIDTH = 10_000
_SECONDS_BETWEEN_REFRESHES = 0.1
ERASED_LINE = "\r\x1b[2K"


def say(message: str) -> None:
    """Print one plain line to standard output, without wrapping or markup."""
    _write(sys.stdout, f"{printable(message)}\n")


def show(text: "Text", end: str = "\n") -> None:
    """Print styled text without wrapping: every line break comes from the text."""
    if is_terminal():
        terminal().print(text, end=end, soft_wrap=True)
    else:
        _write(sys.stdout, f"{printable(text.plain)}{end}")


def warn(message: str) -> None:
    """Print a warning to standard error; the work continues."""
    _write(sys.stderr, _coloured(f"warning: {printable(message)}", "yellow"))


def alert(message: str) -> None:
    """Print an important warning to standard error, in red; the work continues."""
    _write(sys.stderr, _coloured(f"warning: {printable(message)}", "bold red"))


def fail(message: str) -> None:
    """Print why the command stops to standard error.

    The message has no prefix, so that `file:line:column` at its start stays clickable.
    """
    _write(sys.stderr, _coloured(printable(message), "red"))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, show what takes a moment until it is over; a log gets nothing."""
    seen = is_terminal(sys.stderr)
    if seen:
        _write(sys.stderr, f"{printable(what)} ...")
    try:
        yield
    finally:
        if seen:
            _write(sys.stderr, ERASED_LINE)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence["Cell | Text"]]
) -> None:
    """Print a table to standard output, with columns of numbers right-aligned.

    Full-width text stays aligned. On a terminal long cells are folded, never truncated. A Rich
    `Text` keeps its style.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [
        [
            Text(printable(value.plain), value.style)
            if isinstance(value, Text)
            else Text(printable(format_cell(value)))
            for value in row
        ]
        for row in rows
    ]
    table = Table(title=Text(printable(title), style="bold"), title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(reads_as_number(row[index].plain) for row in cells)
        header = Text(printable(column), style="bold")
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    lines = _rendered(table, sys.stdout).splitlines()
    _write(sys.stdout, "".join(f"{line.rstrip()}\n" for line in lines))


def progress(
    description: str, total: int, *, detail: Callable[[], str] | None = None
) -> AbstractContextManager[Callable[[int], None]]:
    """Show progress on standard error: `with progress(...) as advance: advance(1)`.

    On a terminal a bar with the time left; elsewhere a line at the start and at each quarter.
    `detail` says how it goes, in place of the bar's own time left. Nothing to do shows nothing.
    """
    if not total:
        return nullcontext(lambda _: None)
    # Two live views cannot share a terminal: if one is already shown, print lines.
    if is_terminal(sys.stderr) and not hasattr(sys.stderr, "rich_proxied_file"):
        return _progress_bar(printable(description), total, detail)
    return _progress_lines(printable(description), total, detail)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream (default: standard output) is a terminal that supports styles."""
    stream = stream or sys.stdout
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def terminal() -> "Console":
    """The Rich console of standard output, for live views; plain text without a terminal."""
    return _console(sys.stdout)


def printable(text: str) -> str:
    r"""The text with harmful characters escaped: ESC becomes the four characters `\x1b`.

    Text from data or models could otherwise recolour or rewrite the screen.
    """
    return _HARMFUL.sub(_visible, text.replace("\r\n", "\n"))


def format_cell(value: Cell) -> str:
    """A table value as text: thousands separators, four significant digits, a dash for `None`."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return value


def format_duration(seconds: float) -> str:
    """`2:31` or `1:02:31`; no days."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 row`, `1,234 rows`, `1 process` and `2 processes` with the plural given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def as_gigabytes(number: int) -> str:
    """`1.23 GB`, `45.6 MB`: decimal units, as disks and GPUs are sold."""
    if number >= 10**9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.1f} MB"


def reads_as_number(text: str) -> bool:
    """Whether a cell is a number: `12,345`, `91 %`, `0.4 ± 0.1`, `-1 to 2 *`."""
    return text.lower() in _NO_NUMBER or _NUMBER.fullmatch(text) is not None


def _visible(harmful: re.Match[str]) -> str:
    return harmful.group().encode("unicode_escape").decode("ascii")


def _write(stream: TextIO, text: str) -> None:
    """Write to the stream itself, so that a live view on it can make room for the text."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _coloured(message: str, style: str) -> str:
    if not is_terminal(sys.stderr):
        return f"{message}\n"
    from rich.text import Text

    return _rendered(Text(message, style=style), sys.stderr)


def _rendered(renderable: "RenderableType", stream: TextIO) -> str:
    """What Rich prints on this stream, with long lines of text unbroken."""
    from rich.text import Text

    console = _console(stream)
    with console.capture() as captured:
        console.print(renderable, soft_wrap=isinstance(renderable, Text))
    return captured.get()


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    # Rich obeys FORCE_COLOR and would fill a log with control characters, so decide here.
    seen = is_terminal(stream)
    return Console(
        stderr=stream is sys.stderr, force_terminal=seen, width=None if seen else _LOG_WIDTH
    )


@contextmanager
def _progress_bar(
    description: str, total: int, detail: Callable[[], str] | None
) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    description_column = TextColumn("{task.description}", markup=False)
    # No refresh thread: a forked process (a data worker) could inherit its lock while it is held.
    # Do not redirect standard output if it is a file.
    last_column = (
        TextColumn("{task.fields[detail]}", markup=False) if detail else TimeLeft(compact=True)
    )
    bar = Progress(
        *(description_column, BarColumn(), MofNCompleteColumn(), last_column),
        console=_console(sys.stderr),
        auto_refresh=False,
        redirect_stdout=is_terminal(sys.stdout),
    )
    with bar:
        task = bar.add_task(description, total=total, detail="")
        refreshed_at = time.monotonic()

        def advance(num_done: int = 1) -> None:
            nonlocal refreshed_at
            # Work comes in batches, and the last one may be more than is left.
            num_done = min(num_done, total - int(bar.tasks[task].completed))
            due = time.monotonic() - refreshed_at > _SECONDS_BETWEEN_REFRESHES
            if detail and due:
                bar.update(task, detail=detail())
            bar.update(task, advance=num_done, refresh=due)
            if due:
                refreshed_at = time.monotonic()

        yield advance


@contextmanager
def _progress_lines(
    description: str, total: int, detail: Callable[[], str] | None
) -> Iterator[Callable[[int], None]]:
    done, quarters_said = 0, 0
    _write(sys.stderr, f"{description}: 0/{total:,}\n")

    def advance(num_done: int = 1) -> None:
        nonlocal done, quarters_said
        done = min(total, done + num_done)
        quarters = min(4, 4 * done // total)
        if quarters > quarters_said:
            quarters_said = quarters
            said = f", {detail()}" if detail else ""
            share = 100 * done // total
            _write(sys.stderr, f"{description}: {done:,}/{total:,} ({share} %){said}\n")

    yield advance
