"""A json file that is read piece by piece is read as if it were read at once."""

import json
import random

import pytest

from yrunner.data.readers import json as json_files
from yrunner.data.readers.files import read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError

VALUES = [
    {"text": 'a "quoted" \\ line\nend', "名": ["灯", {"塔": None}]},
    {},
    [],
    "",
    "😀 \u2028 ]},[{",
    -12.5e-30,
    1e300,
    0,
    10**30,
    True,
    None,
    float("-inf"),
    [[1, 2], [3.25, [4]]],
]


def outcome(path) -> object:
    """The rows of a file, or the sentence that refuses it."""
    try:
        return [row for _, row in read_rows(path)]
    except DataError as error:
        return str(error).removeprefix(f"{path}: ").split(". ")[0]


def at_once(text: str) -> object:
    """What `json.loads` makes of the same text."""
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at line {error.lineno} column {error.colno}"
    return value if isinstance(value, list) else [value]


@pytest.fixture(params=[1, 2, 3, 7, 64])
def piece(request, monkeypatch) -> int:
    """Characters that are read at once: so few that everything is cut somewhere."""
    monkeypatch.setattr(json_files, "CHARACTERS_AT_ONCE", request.param)
    return request.param


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_cut_anywhere_an_array_gives_its_items(piece, indent, ascii_only, write):
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
    assert outcome(write("a.json", text)) == VALUES
    assert outcome(write("b.json", f"\r\n\t {text} \n")) == VALUES
    assert outcome(write("c.json", json.dumps(VALUES[0], indent=indent))) == [VALUES[0]]


@pytest.mark.parametrize("seed", range(150))
def test_a_broken_file_gives_the_fault_that_the_whole_text_has(seed, monkeypatch, write):
    chance = random.Random(seed)
    monkeypatch.setattr(json_files, "CHARACTERS_AT_ONCE", chance.choice([1, 5, 20, 100]))
    text = json.dumps(VALUES, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    place = chance.randrange(len(text))
    sign = chance.choice(["", "", ",", "]", "[", '"', "\\", "1", "e", "\n", "{", ":", "]]", "tru"])
    text = text[:place] + sign + text[place + chance.choice([0, 1, 1000]) :]
    assert outcome(write("a.json", text)) == at_once(text)


@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "1 2", "]"])
def test_a_small_broken_file_gives_the_fault_that_the_whole_text_has(text, piece, write):
    assert outcome(write("a.json", text)) == at_once(text)


def test_a_fault_is_found_without_reading_to_the_end(monkeypatch, write):
    monkeypatch.setattr(json_files, "CHARACTERS_AT_ONCE", 1000)
    path = write("a.json", '[{"a" 1},' + '{"a": 1},' * 10_000 + "1]")
    told: list[int] = []
    with pytest.raises(DataError, match="Expecting ':' delimiter at line 1 column 7"):
        list(json_files.read_json(path, told.append))
    assert sum(told) <= path.stat().st_size


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_key_that_stands_twice_damages_its_row_alone(name, write):
    lines = ['{"a": 1, "b": {"": 1, "": 2}}', '{"a": 1}', '{"a": 1, "b": 2, "a": 1}', '{"b": 1}']
    text = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    rows = [row for _, row in read_rows(write(name, text))]
    assert rows == [
        'duplicate key "" in an object',
        {"a": 1},
        'duplicate key "a" in an object',
        {"b": 1},
    ]
    assert [isinstance(row, Damaged) for row in rows] == [True, False, True, False]
