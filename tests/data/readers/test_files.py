"""Every kind of file is read row by row, and every fault has its place."""

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yrunner.data.readers.files import COLUMNAR, READERS, notes_on, read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError

ROWS = [{"instruction": "问？", "output": '答, \n"so"'}, {"instruction": "b", "output": "c"}]
PACKABLE = [kind for kind in READERS if kind not in COLUMNAR]
CSV = 'instruction,output\n问？,"答, \n""so"""\n\nb,c\n'


def rows_of(path):
    return [row for _, row in read_rows(path)]


def numbers_of(path):
    return [origin.row for origin, _ in read_rows(path)]


def message_of(path):
    with pytest.raises(DataError) as refused:
        list(read_rows(path))
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{path.parent}/", "")


def as_file(name, write, *, mark=b"", line_end="\n"):
    """ROWS as a file of this kind."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = {".json": json.dumps(ROWS), ".jsonl": "\n\n".join(lines), ".csv": CSV}
    text[".ndjson"] = text[".jsonl"]
    text[".tsv"] = re.sub(r",(?! )", "\t", CSV)
    return write(f"rows{name}", mark + text[name].replace("\n", line_end).encode())


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_come_out_as_they_went_in_with_and_without_a_byte_order_mark(kind, mark, write):
    assert rows_of(as_file(kind, write, mark=mark)) == ROWS


def test_windows_line_ends_change_nothing_but_inside_quoted_fields(write):
    assert rows_of(as_file(".jsonl", write, line_end="\r\n")) == ROWS
    inside = {**ROWS[0], "output": ROWS[0]["output"].replace("\n", "\r\n")}
    assert rows_of(as_file(".csv", write, line_end="\r\n")) == [inside, ROWS[1]]
    assert rows_of(write("a.txt", "one\r\n\r\n two\r\n")) == [{"text": "one"}, {"text": " two"}]


def test_numbers_are_those_of_lines_and_of_records(write):
    assert numbers_of(as_file(".jsonl", write)) == [1, 3]
    assert numbers_of(as_file(".json", write)) == [1, 2]
    assert numbers_of(as_file(".csv", write)) == [1, 2]
    assert numbers_of(write("a.txt", "\none\n\n\ntwo")) == [2, 5]


def test_line_separators_of_unicode_do_not_end_a_line(write):
    assert rows_of(write("a.jsonl", '{"text": "a\u2028b\u0085c"}')) == [{"text": "a\u2028b\u0085c"}]
    assert rows_of(write("a.txt", "a\u2028b\x0cc")) == [{"text": "a\u2028b\x0cc"}]


def test_parquet_rows_come_out_as_they_went_in(tmp_path):
    path = tmp_path / "rows.parquet"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk, "id": 1}, {"messages": None, "id": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert rows_of(path) == rows
    assert numbers_of(path) == [1, 2]


def test_dates_that_python_cannot_hold_do_not_stop_a_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    times = {
        "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "far": pa.array([2**60], pa.timestamp("ms")),
        "long": pa.array([2**60], pa.duration("s")),
    }
    pq.write_table(pa.table({"text": ["a"], **times}), path)
    (row,) = rows_of(path)
    assert row["text"] == "a"
    assert row["nanoseconds"] == "1970-01-01 00:00:00.000000001"


def test_a_parquet_map_with_numbers_for_keys_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"m": pa.array([[(1, "a")]], pa.map_(pa.int32(), pa.string()))}), path)
    assert rows_of(path) == [{"m": [(1, "a")]}]


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("content", ["", "\ufeff", "\n \n"])
def test_an_empty_file_has_no_rows(kind, content, write):
    assert rows_of(write(f"a{kind}", content)) == []


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_another_encoding_names_the_line_and_the_byte(kind, mark, write):
    path = write(f"a{kind}", mark + b"text\n" + "caf\u00e9".encode("latin-1"))
    assert message_of(path) == (
        f"a{kind}: line 2: byte {9 + len(mark)} of the file (0xe9) is not UTF-8. "
        "Save the file as UTF-8"
    )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf16_is_told_from_other_encodings(encoding, write):
    path = write("a.csv", "\ufefftext\n灯".encode(encoding))
    value = path.read_bytes()[0]
    assert message_of(path) == (
        f"a.csv: line 1: byte 1 of the file (0x{value:02x}) is not UTF-8. It looks like UTF-16; "
        "save the file as UTF-8, or run: iconv -f UTF-16 -t UTF-8"
    )


@pytest.mark.parametrize("kind", PACKABLE)
def test_a_packed_file_has_the_rows_of_the_file_in_it(kind, write, tmp_path):
    content = CSV if kind == ".txt" else as_file(kind, write).read_text("utf-8")
    plain = write(f"a{kind}", content)
    packed = write(f"b{kind}.GZ", gzip.compress(content.encode()))
    assert rows_of(packed) == rows_of(plain)
    assert numbers_of(packed) == numbers_of(plain)


def test_the_byte_that_is_not_utf8_is_counted_in_the_unpacked_file(write):
    path = write("a.txt.gz", gzip.compress(b"text\n\xe9"))
    assert "line 2: byte 6 of the decompressed file (0xe9)" in message_of(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: content[:40] + b"\0" * 40 + content[80:],
        lambda content: b"text" + content,
        lambda content: content[:-8] + b"12345678",
    ],
    ids=["truncated", "overwritten", "not gzip", "another sum"],
)
def test_a_damaged_gzip_file_is_refused(damage, write):
    rows = "".join(json.dumps({"text": str(number**9)}) + "\n" for number in range(500))
    message = message_of(write("a.jsonl.gz", damage(gzip.compress(rows.encode()))))
    assert message.startswith("a.jsonl.gz: damaged gzip file: ")
    assert message.endswith("Download or compress it again")


def test_a_packed_parquet_file_is_refused(write):
    assert message_of(write("a.parquet.gz", b"")) == (
        "a.parquet.gz: a gzipped parquet file cannot be read. Decompress it: gunzip a.parquet.gz"
    )


def test_the_bytes_told_of_sum_up_to_the_size_of_the_file(write, tmp_path):
    text = "".join(json.dumps({"text": "灯" * number}) + "\n" for number in range(2000))
    pq.write_table(pa.table({"text": ["灯"] * 2500}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    for path in (
        write("a.jsonl", text),
        write("a.json", f"[{text.replace(chr(10), ',')}1]"),
        write("a.txt.gz", gzip.compress(text.encode())),
        write("b.txt", text),
        write("c.txt", ""),
        tmp_path / "a.parquet",
        tmp_path / "b.parquet",
    ):
        for document in ("line", "file"):
            told: list[int] = []
            num_rows = sum(1 for _ in read_rows(path, document=document, advance=told.append))
            assert sum(told) == path.stat().st_size, (path, num_rows)
            assert all(num_bytes >= 0 for num_bytes in told)


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz"])
def test_the_first_row_comes_before_the_file_is_read_to_its_end(kind, write):
    rows = [f'"{random.Random(number).randbytes(5_000).hex()}"' for number in range(500)]
    text = f"[{','.join(rows)}]" if kind == ".json" else "\n".join(rows)
    content = gzip.compress(text.encode(), 1) if kind.endswith(".gz") else text.encode()
    path = write(f"a{kind}", content)
    told: list[int] = []
    next(read_rows(path, advance=told.append))
    assert 0 < sum(told) < path.stat().st_size / 2


def test_a_whole_txt_file_may_be_one_document(write):
    path = write("a.txt", "\ufeffone\r\n\r\n two\n")
    assert [(origin.row, row) for origin, row in read_rows(path, document="file")] == [
        (1, {"text": "one\n\n two\n"})
    ]
    assert list(read_rows(write("b.txt", " \n\n"), document="file")) == []


def test_a_broken_json_file_names_line_and_column(write):
    assert message_of(write("a.json", '[{"text": "a"},\n {"text" "b"}]')) == (
        "a.json: invalid JSON: Expecting ':' delimiter at line 2 column 10. Fix it there, or "
        "rename the file to .jsonl if it has one object per line"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "invalid JSON: Expecting ',' delimiter at column 13"),
        (
            "{'text': 'a'}",
            "invalid JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        ('{"text": "a"} {}', "invalid JSON: Extra data at column 15"),
        ('{"text": "a\tb"}', "invalid JSON: Invalid control character at column 12"),
        ("[" * 100_000, "lists and objects are nested too deeply"),
        ('{"text":' * 100_000, "lists and objects are nested too deeply"),
        ("[" + "9" * 5000 + "]", "a number has too many digits"),
    ],
)
def test_a_broken_line_is_a_damaged_row_among_sound_ones(line, reason, write):
    path = write("a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}')
    (_, first), (origin, damaged), (_, last) = read_rows(path)
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert isinstance(damaged, Damaged)
    assert (origin.row, str(damaged)) == (2, reason)
    assert reason.split(" at ")[0] in message_of(write("a.json", line))


def test_values_that_are_no_objects_are_rows_for_others_to_judge(write):
    assert rows_of(write("a.jsonl", '[1]\n2\n"text"\nnull')) == [[1], 2, "text", None]
    assert rows_of(write("a.json", "[[1], 2]")) == [[1], 2]
    assert rows_of(write("a.json", '{"text": "a"}')) == [{"text": "a"}]


def test_numbers_that_json_does_not_know_do_not_stop_a_file(write):
    (row,) = rows_of(write("a.jsonl", '{"text": "a", "score": NaN, "best": -Infinity}'))
    assert row["text"] == "a"


def test_a_record_with_too_many_or_too_few_fields_is_damaged(write):
    rows = rows_of(write("a.csv", "instruction,output\na\nb,c\nd,e,f\n"))
    assert rows == [
        "number of fields is 1, but 2 in the header",
        {"instruction": "b", "output": "c"},
        "number of fields is 3, but 2 in the header",
    ]
    assert [isinstance(row, Damaged) for row in rows] == [True, False, True]


def test_a_header_that_names_a_column_twice_is_refused(write, tmp_path):
    expected = 'duplicate column "output" in the header. Rename one of them'
    assert message_of(write("a.csv", "output,output\na,b\n")) == f"a.csv: {expected}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["output"] * 2)
    pq.write_table(table, tmp_path / "a.parquet")
    assert message_of(tmp_path / "a.parquet") == f"a.parquet: {expected}"


def test_a_broken_quote_names_the_record_and_the_line(write):
    message = message_of(write("a.csv", 'text\nfine\n"two\nlines"\n"open\nend\n'))
    assert message.startswith("a.csv row 3: invalid CSV: unexpected end of data (line 6). Quote")


def test_a_broken_tsv_file_says_what_separates_its_fields(write):
    message = message_of(write("a.tsv", 'text\tid\n"open\t1\n'))
    assert message.startswith("a.tsv row 1: invalid TSV: unexpected end of data (line 2). Quote")
    assert "fields that contain tabs or line ends" in message


def test_a_field_may_be_as_long_as_a_book(write):
    book = "灯" * 200_000
    assert rows_of(write("a.csv", f'text\n"{book}"\n')) == [{"text": book}]


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    message = message_of(path)
    assert message.startswith("rows.parquet: damaged parquet file: ")
    assert message.endswith("Write or download it again")


def test_a_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert message_of(tmp_path / "a.parquet").startswith(
        "a.parquet: a string after row 0 is not UTF-8"
    )


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_is_named(kind, tmp_path):
    assert (
        message_of(tmp_path / f"a{kind}") == f"a{kind}: cannot be read: No such file or directory"
    )


def test_a_folder_and_unknown_kinds_are_refused(tmp_path):
    (tmp_path / "a.json").mkdir()
    assert message_of(tmp_path / "a.json") == "a.json: cannot be read: Is a directory"
    kinds = (
        "Use one of .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .txt (or .gz of any but "
        ".parquet and .arrow)"
    )
    assert message_of(Path("a.doc")) == f"a.doc: .doc files are not supported. {kinds}"
    assert message_of(Path("a")) == f"a: has no file suffix. {kinds}"


def test_the_ending_may_be_in_capitals(write):
    assert rows_of(write("a.JSONL", '{"text": "a"}')) == [{"text": "a"}]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "separator", "word"),
    [
        ("a.csv", ";", "semicolons"),
        ("a.csv", "\t", "tabs"),
        ("a.csv", "|", "bars"),
        ("a.tsv", ",", "commas"),
        ("a.tsv.gz", ";", "semicolons"),
    ],
)
def test_another_separator_is_found_in_the_header_and_named(name, separator, word, mark, write):
    cell = f'"a{separator} ""b""\nc, d; e"'
    text = f"{mark}instruction{separator}output\r\nq{separator}{cell}\r\n"
    path = write(name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert rows_of(path) == [{"instruction": "q", "output": f'a{separator} "b"\nc, d; e'}]
    assert notes_on(path) == [f"fields are separated by {word}"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("text\na;b|c\n", [{"text": "a;b|c"}]),
        ('"a;b;c",output\n1,2\n', [{"a;b;c": "1", "output": "2"}]),
        ("instruction,output\na;b,c;d\n", [{"instruction": "a;b", "output": "c;d"}]),
    ],
)
def test_the_usual_separator_stays_where_it_names_the_columns(text, rows, write):
    path = write("a.csv", text)
    assert rows_of(path) == rows
    assert notes_on(path) == []


@pytest.mark.parametrize(
    "text",
    [
        "instruction,output,,\nq1,a1,,\nq2,a2,,\n",
        "instruction,output\nq1,a1,,\nq2,a2,\n",
        "instruction;output;;\nq1;a1;;\nq2;a2;;\n",
        ",instruction,output\n0,q1,a1\n1,q2,a2\n",
        ",,\ninstruction,,output\nq1,,a1\nq2,x,a2\n",
    ],
)
def test_columns_without_a_name_are_left_out(text, write):
    path = write("a.csv", text)
    expected = [{"instruction": f"q{n}", "output": f"a{n}"} for n in (1, 2)]
    assert rows_of(path) == expected
    assert numbers_of(path) == [1, 2]


def test_a_value_behind_the_last_named_column_damages_its_row(write):
    path = write("a.csv", "instruction,output,,\nq,a, b,\nq,a,,\n")
    damaged, sound = rows_of(path)
    assert str(damaged) == "number of fields is 3, but 2 in the header"
    assert isinstance(damaged, Damaged)
    assert sound == {"instruction": "q", "output": "a"}


def test_a_line_for_excel_is_refused(write):
    assert message_of(write("a.csv", "sep=;\ninstruction;output\n")) == (
        "a.csv: begins with sep=;, a line for Excel. Remove the first line"
    )


def write_arrow(path, rows, *, as_file=False, batch=1000):
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=batch)
    return path


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_arrow_rows_come_out_as_they_went_in(as_file, batch, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "灯" * n}], "id": n} for n in range(2100)]
    path = write_arrow(tmp_path / "a.arrow", rows, as_file=as_file, batch=batch)
    told: list[int] = []
    found = list(read_rows(path, advance=told.append))
    assert [row for _, row in found] == rows
    assert [origin.row for origin, _ in found] == list(range(1, 2101))
    assert sum(told) == path.stat().st_size


def test_a_damaged_arrow_file_is_refused(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", [{"text": "a" * 50}] * 100)
    path.write_bytes(path.read_bytes()[:-2000])
    assert message_of(path).startswith("a.arrow: damaged arrow file: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is a Git LFS pointer, not the data itself. Run git lfs pull in its repository",
        ),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is a Git LFS pointer, not the data itself. Run git lfs pull in its repository",
        ),
        (
            "a.jsonl",
            b"\n<!DOCTYPE html>\n<html>",
            "is an HTML page, not data. Download the file itself; on the Hub, use its raw link",
        ),
        (
            "a.csv",
            b"<HTML lang=en>",
            "is an HTML page, not data. Download the file itself; on the Hub, use its raw link",
        ),
        (
            "a.json",
            gzip.compress(b"[]", mtime=0),
            "is gzip-compressed, but not named so. Rename it to a.json.gz",
        ),
        (
            "a.csv",
            b"PK\x03\x04...",
            "is a zip archive or an Excel file. Unpack it, or save the table as CSV (UTF-8) or as "
            "parquet",
        ),
        (
            "a.jsonl",
            b"PAR1...",
            "is a parquet file, but not named so. Give it the ending .parquet",
        ),
        (
            "a.jsonl",
            b"\x28\xb5\x2f\xfd...",
            "is compressed with zstd. Decompress it: zstd -d -o NEW_FILE a.jsonl",
        ),
        (
            "a.xlsx",
            b"PK",
            ".xlsx files are not supported. Save the table as CSV (UTF-8) or as parquet",
        ),
        ("a.jsonl.zst", b"", ".zst files are not supported. Decompress it: unzstd a.jsonl.zst"),
        ("a.tar.gz", b"", ".tar.gz files are not supported. Unpack it: tar -xf a.tar.gz"),
    ],
)
def test_what_is_no_data_is_named_with_the_way_to_it(name, content, message, write):
    assert message_of(write(name, content)) == f"{name}: {message}"


def test_a_page_may_be_a_document(write):
    assert rows_of(write("a.txt", "<html>")) == [{"text": "<html>"}]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_chinese_in_another_encoding_is_recognised(kind, encoding, write):
    path = write(f"a{kind}", "text\n问题一，灯塔归谁管？\n".encode(encoding))
    assert message_of(path).endswith(
        "is not UTF-8. It looks like GB18030; save the file as UTF-8, or run: "
        "iconv -f GB18030 -t UTF-8"
    )
    western = write(f"b{kind}", "text\nune question étrange à l'été\n".encode("cp1252"))
    assert message_of(western).endswith("is not UTF-8. Save the file as UTF-8")
