"""A json file that is read piece by piece is read as if it were read at once."""

import json
import random

import pytest

from yrunner.data.readers import json as json_files
from yrunner.data.readers.files import notes_on, read_rows
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
        said = error.msg.removesuffix(" at")  # some of Python's sentences end with it
        return f"invalid JSON: {said} at line {error.lineno} column {error.colno}"
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


ITEMS = [{"instruction": "q", "output": "a\nb"}, {"instruction": "[{", "output": "}]"}, {"x": []}]
IN_ORDER = ["not one JSON value per line; rows are numbered in their order"]


def numbered(path) -> list[tuple[int, object]]:
    return [(origin.row, row) for origin, row in read_rows(path)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ITEMS),
        json.dumps(ITEMS, indent=2),
        f"\ufeff\n{json.dumps(ITEMS)}\n\n",
        f"{json.dumps(ITEMS[:2])}\n{json.dumps(ITEMS[2:])}\n",
        "\n".join(json.dumps(item, indent=1) for item in ITEMS),
    ],
    ids=["array", "indented array", "mark and blank lines", "arrays", "indented objects"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_rows_that_are_not_line_by_line_are_numbered_in_their_order(text, name, piece, write):
    path = write(name, text)
    assert numbered(path) == list(enumerate(ITEMS, start=1))
    assert notes_on(path) == IN_ORDER


def test_a_json_file_with_a_row_per_line_is_numbered_by_line(piece, write):
    lines = ["", *map(json.dumps, ITEMS[:2]), "", '{"broken', json.dumps(ITEMS[2])]
    path = write("a.json", "\n".join(lines))
    *sound, (number, damaged), last = numbered(path)
    assert [*sound, last] == [(2, ITEMS[0]), (3, ITEMS[1]), (6, ITEMS[2])]
    assert number == 5
    assert isinstance(damaged, Damaged)
    assert notes_on(path) == ["one JSON value per line, numbered by line"]


def test_usual_files_need_no_note(write):
    for name, text in (
        ("a.jsonl", json.dumps(ITEMS[0])),
        ("b.jsonl", "\n".join(map(json.dumps, ITEMS))),
        ("c.jsonl", "[1]\n[2]"),
        ("d.jsonl", '{"broken\n{"a": 1}'),
        ("a.json", json.dumps(ITEMS)),
        ("b.json", json.dumps(ITEMS[0], indent=1)),
    ):
        assert notes_on(write(name, text)) == [], name


@pytest.mark.parametrize(
    "around",
    [
        '{"data": %s}',
        '{\n "version": "1.0",\n "meta": {"data": [1]},\n "data": %s,\n "more": [{"a": 1}]\n}\n',
        '{"train": %s}',
        '{"name": "x", "rows": %s, "total": 3}',
    ],
)
def test_rows_inside_an_object_are_read_one_by_one(around, piece, write):
    path = write("a.json", around % json.dumps(ITEMS, indent=1))
    assert numbered(path) == list(enumerate(ITEMS, start=1))
    assert notes_on(path) == ["rows are the items of an array inside an object"]


def test_an_object_with_rows_is_read_without_holding_it(write, monkeypatch):
    monkeypatch.setattr(json_files, "CHARACTERS_AT_ONCE", 1000)
    path = write("a.json", json.dumps({"data": [{"text": "x" * 100}] * 5000}))
    told: list[int] = []
    next(read_rows(path, advance=told.append))
    assert sum(told) < path.stat().st_size
    document = json_files.Document(path, path.open())
    longest = max(len(document.text) for _ in document.rows("wrapped"))
    assert longest < 5000


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"train": ITEMS, "test": ITEMS}, '"train" and "test"'),
        ({"train": ITEMS, "validation": ITEMS, "test": []}, '"train" and "validation"'),
        ({"test": ITEMS}, '"test"'),
    ],
)
def test_an_object_with_several_splits_is_refused(value, names, write):
    assert outcome(write("a.json", json.dumps(value))) == f"is an object with the rows of {names}"


def test_a_row_with_such_a_key_stays_a_row(write):
    turns = [{"role": "user", "content": "q"}]
    for row in ({"data": turns}, {"data": "x"}, {"id": 1, "data": [{"a": 1}]}, {"items": [1]}):
        assert outcome(write("a.json", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    "text", ['{"data": [{}', '{"data": [{}], 1: 2}', '{"data": [{}] "a": 1}', '{"data": [{}]} 1']
)
def test_a_fault_inside_an_object_with_rows_is_found(text, piece, write):
    assert outcome(write("a.json", text)) == at_once(text)


def test_a_comma_at_the_end_of_an_object_with_rows_is_refused(piece, write):
    found = outcome(write("a.json", '{"data": [{}], }'))
    assert found == (
        "invalid JSON: Expecting property name enclosed in double quotes at line 1 column 16"
    )
