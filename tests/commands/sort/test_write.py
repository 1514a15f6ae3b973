"""Rows come out of `yrun sort` exactly as they went in, only in another order."""

import csv
import gzip
import io
import json
import random
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yrunner.commands.sort.write import check_one_kind, ending_of, write_rows
from yrunner.data.readers import json as json_files
from yrunner.data.readers.files import READERS, read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError

LINES = [
    b'{"b": 1, "a": "\\u95ee\\uff1f", "c": 1.50}',
    '{"a":"问？",   "b":[1,  {"z": null}]}'.encode(),
    b'  {"a": "1e2", "b": 1e2}  ',
    b"{broken",
    b'{"a": "a", "a": "twice"}',
]
PRETTY = """\
[
  {
    "b": "ü",
    "a": [1, 2.50]
  },
  {"a": "\\u00fc"},
  3
]
"""
CSV = 'question,"the ""answer"""\r\n问？,"a, \r\n""b"""\r\n\r\nc,d\r\n" e ",\r\nonly one\r\n'


def rows_of(path):
    return [row for _, row in read_rows(path)]


def write_file(folder, name, content):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def content_of(path):
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def reorder(paths, places, folder):
    """Write these rows, as (file, row) pairs, and return the new file."""
    check_one_kind(paths)
    path = folder / f"sorted{ending_of(paths)}"
    write_rows(paths, places, path)
    assert [other for other in folder.iterdir() if other.name.startswith(".")] == []
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_lines_keep_every_byte_also_those_that_nobody_can_read(tmp_path, packed, mark, last):
    content = mark + b"\n \n".join(LINES) + last
    path = write_file(tmp_path, f"rows.jsonl{packed}", content)
    numbers = [origin.row for origin, _ in read_rows(path)]
    assert numbers == [1, 3, 5, 7, 9], "blank lines are no rows"
    written = reorder([path], [(0, row) for row in reversed(numbers)], tmp_path)
    assert content_of(written) == b"\n".join(reversed(LINES)) + b"\n"


def test_lines_of_text_keep_their_blanks_and_windows_line_ends(tmp_path):
    path = write_file(tmp_path, "rows.txt", "one \r\n\r\n\u2028\n  zwei ü\r\nlast".encode())
    written = reorder([path], [(0, 5), (0, 4), (0, 1)], tmp_path)
    assert written.read_bytes() == "last\n  zwei ü\r\none \r\n".encode()


@pytest.mark.parametrize("characters", [1, 7, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_items_of_an_array_keep_their_text_and_the_array_its_form(
    tmp_path, mark, characters, monkeypatch
):
    monkeypatch.setattr(json_files, "CHARACTERS_AT_ONCE", characters)
    path = write_file(tmp_path, "rows.json", mark + PRETTY.encode())
    written = reorder([path], [(0, 3), (0, 2), (0, 1)], tmp_path)
    assert written.read_text("utf-8") == (
        '[\n  3,\n  {"a": "\\u00fc"},\n  {\n    "b": "ü",\n    "a": [1, 2.50]\n  }\n]\n'
    )


def test_an_array_on_one_line_stays_on_it_and_a_single_value_becomes_an_array(tmp_path):
    path = write_file(tmp_path, "rows.json", b'[{"a": 1}, {"a": 2}]')
    assert reorder([path], [(0, 2), (0, 1)], tmp_path).read_text() == '[{"a": 2}, {"a": 1}]'
    path = write_file(tmp_path, "rows.json", b' {"a": 1} ')
    assert rows_of(reorder([path], [(0, 1)], tmp_path)) == [{"a": 1}]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n", "\r"])
def test_records_keep_their_quotes_and_the_line_ends_inside(tmp_path, packed, line_end):
    content = CSV.replace("\r\n", line_end)
    path = write_file(tmp_path, f"rows.csv{packed}", content.encode())
    written = reorder([path], [(0, 4), (0, 3), (0, 1), (0, 2)], tmp_path)
    header, first, second, *rest = content.replace(f"{line_end * 2}c", f"{line_end}c").split(
        line_end
    )
    quoted = f"{first}{line_end}{second}"
    expected = [header, rest[2], rest[1], quoted, rest[0], ""]
    assert content_of(written).decode() == line_end.join(expected)
    assert isinstance(rows_of(written)[0], Damaged)


def test_a_table_without_a_last_line_end_gets_one(tmp_path):
    path = write_file(tmp_path, "rows.tsv", b"a\tb\n1\t2\n3\t4")
    assert reorder([path], [(0, 2), (0, 1)], tmp_path).read_text() == "a\tb\n3\t4\n1\t2\n"


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_parquet_file_keeps_schema_values_and_compression(tmp_path, compression):
    table = pa.table(
        {
            "text": pa.array(["a", None, "问"], pa.large_string()),
            "when": pa.array([datetime(2020, 1, day) for day in (1, 2, 3)], pa.timestamp("ns")),
            "talk": [[{"role": "user", "n": 1}], [], None],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        }
    ).replace_schema_metadata({"made by": "somebody"})
    pq.write_table(table, tmp_path / "rows.parquet", compression=compression)
    written = reorder([tmp_path / "rows.parquet"], [(0, 3), (0, 1)], tmp_path)
    found = pq.ParquetFile(written)
    assert found.read().equals(table.take([2, 0]))
    assert found.schema_arrow.equals(
        pq.ParquetFile(tmp_path / "rows.parquet").schema_arrow, check_metadata=True
    )
    used = found.metadata.row_group(0).column(0).compression
    assert used == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def as_bytes(kind, rows):
    """Rows with the columns a and b as a file of this kind, written by others."""
    match kind:
        case ".json":
            return json.dumps(rows, ensure_ascii=len(rows) % 2 == 0, indent=len(rows) % 3).encode()
        case ".jsonl" | ".ndjson":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        case ".parquet":
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows).select(["a", "b"]), buffer)
            return buffer.getvalue()
        case ".arrow":
            buffer = io.BytesIO()
            table = pa.Table.from_pylist(rows).select(["a", "b"])
            with pa.ipc.new_file(buffer, table.schema) as file:
                file.write_table(table)
            return buffer.getvalue()
        case ".txt":
            return "".join(f"{row['text']}\n" for row in rows).encode()
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["a", "b"], delimiter="," if kind == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"a": CELLS, "b": CELLS}), min_size=1, max_size=8)
# U+FEFF is a byte order mark where it comes to stand first in a file.
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff"), min_size=1)
    .filter(str.strip)
    .map(lambda text: {"text": text}),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("kind", [*READERS, *(f"{kind}.gz" for kind in (".jsonl", ".csv"))])
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_is_written_is_read_again_in_the_new_order(kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    parts = [data.draw(TEXTS if kind == ".txt" else ROWS) for _ in range(2)]
    paths = [
        write_file(folder, f"{name}{kind}", as_bytes(kind.removesuffix(".gz"), rows))
        for name, rows in zip("xy", parts, strict=True)
    ]
    known = {
        (number, origin.row): row
        for number, path in enumerate(paths)
        for origin, row in read_rows(path)
    }
    places = list(known)
    data.draw(st.randoms()).shuffle(places)
    written = reorder(paths, places, folder)
    assert rows_of(written) == [known[place] for place in places]


def test_packed_files_of_equal_rows_are_equal_byte_for_byte(tmp_path):
    path = write_file(tmp_path, "rows.jsonl.gz", b'{"a": 1}\n{"a": 2}\n')
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        reorder([path], [(0, 2), (0, 1)], tmp_path / folder)
    one, two = (tmp_path / folder / "sorted.jsonl.gz" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_plain_and_packed_files_become_a_plain_one(tmp_path):
    paths = [
        write_file(tmp_path, "a.jsonl", b'{"a": 1}'),
        write_file(tmp_path, "b.jsonl.gz", b'{"a": 2}'),
    ]
    written = reorder(paths, [(1, 1), (0, 1)], tmp_path)
    assert written.name == "sorted.jsonl"
    assert written.read_text() == '{"a": 2}\n{"a": 1}\n'


def test_many_lines_are_written_in_a_random_order(tmp_path):
    lines = [json.dumps({"text": "ü" * (number % 7), "n": number}) for number in range(5000)]
    path = write_file(tmp_path, "rows.jsonl", "\n".join(lines).encode())
    order = random.Random(0).sample(range(5000), 5000)
    written = reorder([path], [(0, index + 1) for index in order], tmp_path)
    assert written.read_text("utf-8").splitlines() == [lines[index] for index in order]


@pytest.mark.parametrize(
    ("names", "contents", "message"),
    [
        (("a.jsonl", "b.json"), (b"{}", b"[{}]"), r"b\.json: is not a \.jsonl file like a\.jsonl"),
        (("a.csv", "b.csv"), (b"x,y\n1,2", b"y,x\n1,2"), r"b\.csv: has other columns than a\.csv"),
        (("a.csv", "b.csv"), (b"x;y\n1;2", b"x,y\n1,2"), r"b\.csv: has other columns than a\.csv"),
        (
            ("a.jsonl", "b.jsonl"),
            (b'{"x": 1}', b'[{"x": 1}]'),
            r"b\.jsonl: has another layout than a\.jsonl",
        ),
        (("a.tsv", "b.csv"), (b"x\n1", b"x\n1"), r"b\.csv: is not a \.tsv file like a\.tsv"),
    ],
)
def test_files_that_cannot_become_one_are_refused(tmp_path, names, contents, message):
    paths = [write_file(tmp_path, *file) for file in zip(names, contents, strict=True)]
    with pytest.raises(DataError, match=rf"{message}: their rows cannot .*Sort them one by one"):
        check_one_kind(paths)


def test_parquet_files_of_other_types_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: has other columns than a\.parquet"):
        check_one_kind([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = write_file(tmp_path, "rows.jsonl", b'{"a": 1}\n')
    target = write_file(tmp_path, "sorted.jsonl", b"before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_rows([path], [(0, 1)], target)
    assert target.read_bytes() == b"before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "sorted.jsonl"]


def test_files_that_lie_in_two_places_of_the_recipe_are_read_once(tmp_path: Path):
    path = write_file(tmp_path, "rows.jsonl", b'{"a": 1}\n{"a": 2}\n')
    written = reorder([path, path], [(1, 2), (0, 1), (1, 1), (0, 2)], tmp_path)
    assert [row["a"] for row in rows_of(written)] == [2, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"\xef\xbb\xbfx;y;;\n1;2;;\n3;4;;\n", b"x;y;;\n3;4;;\n1;2;;\n"),
        ("a.csv", b",,\nx,y,\n1,2,\n3,4,\n", b"x,y,\n3,4,\n1,2,\n"),
        ("a.jsonl", b'[{"x": 1}, {"x": 2}]', b'[{"x": 2}, {"x": 1}]'),
        ("a.jsonl", b'{\n "x": 1\n}\n{\n "x": 2\n}\n', b'[{\n "x": 2\n},{\n "x": 1\n}]\n'),
        ("a.json", b'{"x": 1}\n\n{"x": 2}\n', b'{"x": 2}\n{"x": 1}\n'),
        (
            "a.json",
            b'{"version": 1, "data": [\n{"x": 1},\n{"x": 2}]}\n',
            b'{"version": 1, "data": [\n{"x": 2},\n{"x": 1}]}\n',
        ),
    ],
)
def test_files_as_people_have_them_are_reordered_and_read_again(name, content, expected, tmp_path):
    path = write_file(tmp_path, name, content)
    places = [(0, origin.row) for origin, _ in read_rows(path)][::-1]
    written = reorder([path], places, tmp_path)
    assert written.read_bytes() == expected
    assert rows_of(written) == rows_of(path)[::-1]
