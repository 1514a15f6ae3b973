"""The folder of a sort: the names in it, and what of it may be replaced."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from yrunner.belongings import check_belongings, remove
from yrunner.errors import RunError

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


class SortDir:
    """`outputs/<name>/sort`; `ending` is that of the data, such as `.jsonl`."""

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.resolved.yaml"
        self.environment = folder / "environment.json"
        self.data_report = folder / "data_report.json"
        self.measured = folder / "measured"
        """Losses and entropies of all tokens, see scoring/score_file.py."""
        self.cross_fit = folder / "cross_fit"
        """The same by models that were trained for it, a folder for each fold."""
        self.sorted = folder / f"sorted{ending}"
        self.dropped = folder / f"dropped{ending}"
        self.reasons = folder / "dropped_reasons.jsonl"
        self.report = folder / "report.html"
        self.scores = folder / "scores.jsonl"

    def check(self, files: Iterable[Path], *, overwrite: bool) -> None:
        """Raise `RunError` where something would be lost: a finished sort, `files`, or others."""
        if any(file.resolve().parent == self.folder.resolve() for file in files):
            raise RunError(
                f"the data lies in {self.folder}, where the sorted rows would replace it",
                remedy="give this recipe another output",
            )
        check_belongings(self.folder, self.recipe, [*self._results(), self.measured])
        if self.scores.exists() and not overwrite:
            raise RunError(
                f"{self.folder} already holds a finished sort",
                remedy="replace it by --overwrite, which measures no row again that it has "
                "measured, or give this one another output",
            )

    def clear(self) -> None:
        """Make the folder, and remove the results of an earlier sort, but what it has measured."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._results():
            remove(path)

    def _results(self) -> Iterator[Path]:
        """The results that are there, also of a sort whose data had another ending.

        What says that a sort is finished comes first.
        """
        names = [f"{name}{ending}" for name in ("sorted", "dropped") for ending in DATA_ENDINGS]
        rows = (self.folder / f"{name}{packed}" for name in names for packed in ("", ".gz"))
        for path in (self.scores, self.reasons, self.report, *rows):
            if path.exists():
                yield path
