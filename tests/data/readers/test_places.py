"""A path of a recipe finds its data files: one, those of a folder, or those that a glob matches."""

import pytest

from yrunner.data.readers.files import find_files
from yrunner.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them, with more in it than data."""
    for name in (
        "b.jsonl",
        "a.JSON",
        "deep/er/c.csv.gz",
        "deep/d.parquet",
        "deep/dataset_info.json",
        "README.md",
        "make.py",
        ".hidden.jsonl",
        ".git/e.txt",
        "empty/.keep",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def found(folder, place) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder / place).files]


def refusal(folder, place) -> str:
    with pytest.raises(DataError) as refused:
        find_files(folder / place)
    return str(refused.value).replace(str(folder), "")


def test_a_file_is_itself_of_whatever_kind(folder):
    assert found(folder, "b.jsonl") == ["b.jsonl"]
    assert found(folder, "README.md") == ["README.md"]


def test_a_folder_gives_its_data_files_in_order_and_no_others(folder):
    assert found(folder, "") == ["a.JSON", "b.jsonl", "deep/d.parquet", "deep/er/c.csv.gz"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("[ab].*", ["a.JSON", "b.jsonl"]),
        ("deep/*", ["deep/d.parquet"]),
        ("**/?.*", ["a.JSON", "b.jsonl", "deep/d.parquet", "deep/er/c.csv.gz"]),
        ("deep/**", ["deep/d.parquet", "deep/er/c.csv.gz"]),
    ],
)
def test_a_glob_gives_what_it_matches_in_order(glob, expected, folder):
    assert found(folder, glob) == expected


def test_signs_of_a_glob_in_a_real_name_mean_themselves(folder):
    (folder / "[b]").mkdir()
    for name in ("[b].jsonl", "[b]/x*.txt", "[b]/xy.txt"):
        (folder / name).write_text("")
    assert found(folder, "[b].jsonl") == ["[b].jsonl"]
    assert found(folder, "[b]/x*.txt") == ["[b]/x*.txt"]
    assert found(folder, "[b]") == ["[b]/x*.txt", "[b]/xy.txt"]


def test_a_place_without_data_is_named(folder):
    assert refusal(folder, "empty").startswith("/empty: the folder has no data files. Add one of")
    assert refusal(folder, "x*") == "/x*: no such file. Check the path"
    assert refusal(folder, "emp*") == "/emp*: no such file. Check the path"
    assert refusal(folder, "*.*").startswith(
        "/README.md: matches *.* but is not a data file. Narrow the glob; data files are .json,"
    )
