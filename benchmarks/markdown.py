"""Print tables as Markdown, for the pages of docs/."""

from collections.abc import Sequence

Cell = str | float | None


def print_markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table; leave a first cell empty where it repeats the one above."""
    print(f"\n{title}\n")
    print(_line(columns))
    print("|---" * len(columns) + "|")
    above: Cell = None
    for first, *rest in rows:
        shown = [None if first == above else first, *rest]
        print(_line([_format(cell) for cell in shown]))
        above = first


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _format(cell: Cell) -> str:
    """Format numbers with three significant digits."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:,.0f}"
