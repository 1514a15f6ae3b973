"""The text files that a recipe names are read alike, whatever an editor put before the text."""

import codecs
import os

import pytest

from yrunner.errors import YRunnerError
from yrunner.text_files import read_json, read_text

TEXT = "用户：é 🦀\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_without_its_byte_order_mark(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT.encode(encoding))
    assert read_text(file) == TEXT


def test_both_byte_orders_are_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"))
    assert read_text(file) == TEXT


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_line_ends_become_line_feeds_and_other_separators_stay(tmp_path, line_end):
    file = tmp_path / "a.txt"
    file.write_bytes(f"a{line_end}b\u2028c{line_end}".encode())
    assert read_text(file) == "a\nb\u2028c\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "a\n{{ '用户' }}".encode("gb18030"),
            ":2:5: byte 7 of the file (0xd3) is not UTF-8. Save the file as UTF-8; if it is "
            "gb18030: iconv -f gb18030 -t utf-8 a.jinja > utf8-a.jinja",
        ),
        (
            "naïve, déjà \n".encode("latin-1"),
            ":1:3: byte 3 of the file (0xef) is not UTF-8. Save the file as UTF-8; if it is "
            "cp1252: iconv -f cp1252 -t utf-8 a.jinja > utf8-a.jinja",
        ),
        (
            "a 用户镕\n".encode("gbk"),
            ":1:3: byte 3 of the file (0xd3) is not UTF-8. Save the file as UTF-8; if it is "
            "gb18030: iconv",
        ),
        (
            "clénoté\n".encode("latin-1"),
            ":1:3: byte 3 of the file (0xe9) is not UTF-8. Save the file as UTF-8; if it is "
            "cp1252: iconv",
        ),
        (
            "ab".encode("utf-16-le"),
            ":1:2: a NUL character, so this is not UTF-8 text. Save the file as UTF-8; if it is "
            "utf-16-le: iconv -f utf-16-le -t utf-8 a.jinja > utf8-a.jinja",
        ),
        (codecs.BOM_UTF16_LE + b"a\x00b", ":1:2: byte 5 of the file (0x62) is not UTF-16"),
    ],
    ids=["gb18030", "latin-1", "gbk", "pairs", "utf-16 without mark", "half a character"],
)
def test_another_encoding_is_refused_with_its_place_and_a_command(tmp_path, content, said):
    file = tmp_path / "a.jinja"
    file.write_bytes(content)
    with pytest.raises(YRunnerError) as refused:
        read_text(file)
    assert str(refused.value).startswith(f"{file}{said}"), str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.touch(0o000)
    with pytest.raises(YRunnerError, match=r"cannot be read \(Permission denied\)"):
        read_text(file)


def test_a_folder_a_missing_file_and_a_huge_one_are_refused(tmp_path):
    for name, said in [("", "is a folder, but"), ("none", "there is no file"), ("\0", "cannot be")]:
        with pytest.raises(YRunnerError, match=said):
            read_text(tmp_path / name)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(10_000_001)
    with pytest.raises(YRunnerError, match=r"huge\.json is larger than 10,000,000 bytes"):
        read_text(huge)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"a\.json:1:1: Expecting value\. Correct the JSON"),
        ('{"a": 1,\n}', r"a\.json:2:1: "),
        ("[" * 100_000, r"a\.json is not valid JSON: "),
        ("9" * 5000, r"a\.json is not valid JSON: Exceeds"),
    ],
)
def test_json_that_is_not_valid_is_refused_with_its_place(tmp_path, text, said):
    file = tmp_path / "a.json"
    file.write_text(text, "utf-16")
    with pytest.raises(YRunnerError, match=said):
        read_json(file)
