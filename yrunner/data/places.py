"""Find the data files that one path of a recipe means: a file, a folder of them, or a glob."""

from glob import escape, glob
from pathlib import Path

from yrunner.data.files import KINDS, kind_of
from yrunner.errors import DataError

# What the libraries that write datasets put beside them.
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")


def find_files(place: Path) -> list[Path]:
    """The data files at `place`, in the order of their names.

    A folder gives the data files in it and in its folders; hidden ones and files of other kinds
    are passed over. Of a glob (`*`, `?`, `[a-z]`, `**` for any depth of folders) every match must
    be a data file. Raises `DataError` where that is not so, or nothing is found.
    """
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [path for path in _matches(f"{escape(str(place))}/**") if is_data_file(path)]
        if not files:
            raise DataError(place, "the folder holds no data file", remedy=f"add one of {KINDS}")
        return files
    files = _matches(str(place))
    if not files:
        raise DataError(place, "there is no such file", remedy="check the path")
    for path in files:
        if kind_of(path) is None:
            raise DataError(
                path,
                f"this match of {place.name} is no data file",
                remedy=f"narrow the glob; data files are {KINDS}",
            )
    return files


def is_data_file(path: Path) -> bool:
    """Whether a file found in a folder holds rows, by its name."""
    return kind_of(path) is not None and path.name not in DESCRIPTIONS


def _matches(pattern: str) -> list[Path]:
    matches = sorted({Path(match) for match in glob(pattern, recursive=True)})
    return [path for path in matches if path.is_file()]
