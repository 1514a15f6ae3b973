"""A path of a recipe finds its data files: one, those of a folder, or those that a glob matches."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from yrunner.data.readers.files import find_files, split_of
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


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def names_of(files, folder):
    return [path.relative_to(folder).as_posix() for path in files]


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "train", "validation"),
        (["train-00000-of-00002.parquet", "dev-00000-of-00001.parquet"], "train", "dev"),
        (["train/a.arrow", "val/a.arrow", "test/a.arrow"], "train", "val"),
        (["law_train.csv", "law_eval.csv.gz", "law_test.csv"], "law_train", "law_eval"),
        (["rows.jsonl", "valid.jsonl", "test.jsonl"], "rows", "valid"),
        (["训练集.jsonl", "验证集.jsonl", "测试集.jsonl"], "训练集", "验证集"),
        (
            ["train_sft/a.jsonl", "test_sft/a.jsonl", "TRAIN.jsonl", "Dev.jsonl"],
            ("TRAIN", "train_sft"),
            "Dev",
        ),
    ],
)
@pytest.mark.parametrize("place", ["", "**/*.*"])
def test_files_of_a_split_serve_only_their_purpose(names, train, validation, place, tmp_path):
    put(tmp_path, *names)
    trained = find_files(tmp_path / place)
    assert all(name.startswith(train) for name in names_of(trained.files, tmp_path))
    assert {*trained.files, *trained.others} == {tmp_path / name for name in names}
    validated = find_files(tmp_path / place, "validation")
    assert all(name.startswith(validation) for name in names_of(validated.files, tmp_path))
    assert not {*trained.files} & {*validated.files}


def test_test_data_is_never_used_by_accident(tmp_path):
    put(tmp_path, "test.jsonl", "test-2.jsonl")
    message = refusal(tmp_path, "")
    assert message == (
        ": has no files to train on, only of other splits: test-2.jsonl, test.jsonl. To use them "
        "anyway, name each with file: ..."
    )
    put(tmp_path / "b", "train.jsonl", "test.jsonl")
    with pytest.raises(DataError, match="has no files to validate on, only of other splits"):
        find_files(tmp_path / "b", "validation")


def test_a_path_that_names_a_split_means_it(tmp_path):
    put(tmp_path, "train.jsonl", "test-1.jsonl", "test-2.jsonl", "test/x.jsonl")
    assert found(tmp_path, "test-1.jsonl") == ["test-1.jsonl"]
    assert found(tmp_path, "test-*.jsonl") == ["test-1.jsonl", "test-2.jsonl"]
    assert found(tmp_path, "test") == ["test/x.jsonl"]
    assert found(tmp_path, "test/*") == ["test/x.jsonl"]


@pytest.mark.parametrize(
    "name", ["unit-test-cases.jsonl", "contest.jsonl", "latest.csv", "trained.txt", "values.json"]
)
def test_a_word_inside_a_name_is_no_split(name):
    assert split_of(Path(name)) is None


def test_a_saved_data_set_gives_the_files_that_its_state_lists(tmp_path):
    table = pa.table({"text": ["a", "b"]})
    for name in ("data-00000-of-00001", "cache-1f2e"):
        with pa.ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert found(tmp_path, "") == ["data-00000-of-00001.arrow"]


def test_each_split_of_a_saved_data_set_dict_serves_its_purpose(tmp_path):
    put(tmp_path, "dataset_dict.json")
    for split in ("train", "validation", "test"):
        put(tmp_path / split, "data-00000-of-00001.arrow", "dataset_info.json")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    assert found(tmp_path, "") == ["train/data-00000-of-00001.arrow"]
    validation = find_files(tmp_path, "validation").files
    assert names_of(validation, tmp_path) == ["validation/data-00000-of-00001.arrow"]


def test_a_folder_says_which_of_its_files_cannot_be_read(tmp_path):
    put(tmp_path, "a.jsonl", "b.jsonl.zst", "table.xlsx")
    assert refusal(tmp_path, "") == (
        "/b.jsonl.zst: is a compressed data file that cannot be read. Decompress it: "
        "unzstd b.jsonl.zst"
    )
    put(tmp_path / "tables", "rows.xlsx", "README.md")
    assert refusal(tmp_path, "tables") == (
        "/tables/rows.xlsx: .xlsx files are not supported. Save the table as CSV (UTF-8) or as "
        "parquet"
    )


def test_a_list_of_data_sets_is_no_data(tmp_path):
    put(tmp_path, "dataset_info.json", "a.json")
    assert found(tmp_path, "") == ["a.json"]
    assert refusal(tmp_path, "dataset_info.json") == (
        "/dataset_info.json: describes data files and has no rows. Name the folder or a data file"
    )
