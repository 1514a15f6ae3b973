"""A text is decoded as it is read: no character is lost where a piece of the file ends."""

import re

import pytest

from yrunner.data.readers import text as text_files
from yrunner.data.readers.text import open_text
from yrunner.errors import DataError

TEXT = "aé灯😀\n\u2028\x85\x0c" * 40


@pytest.fixture(params=[1, 2, 3, 5, 4096])
def piece(request, monkeypatch) -> int:
    """Bytes that are read at once."""
    monkeypatch.setattr(text_files, "BYTES_AT_ONCE", request.param)
    return request.param


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_characters_that_are_cut_in_two_come_out_whole(mark, piece, write):
    with open_text(write("a.txt", mark + TEXT)) as text:
        assert list(text) == re.findall(r"[^\n]*\n|[^\n]+$", TEXT)


@pytest.mark.parametrize("wrong", [b"\xe9", b"\xe7\x81", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"])
@pytest.mark.parametrize("behind", [b"", b"a", "灯".encode()])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_first_wrong_byte_is_the_one_that_decoding_at_once_names(
    wrong, behind, mark, piece, write
):
    content = mark + TEXT.encode() + wrong + behind
    with pytest.raises(UnicodeDecodeError) as whole:
        content.decode()
    place = whole.value.start
    with pytest.raises(DataError) as refused, open_text(write("a.txt", content)) as text:
        text.read()
    line = content[:place].count(b"\n") + 1
    assert f"line {line}: byte {place + 1} of the file (0x{wrong[0]:02x})" in str(refused.value)
