"""Errors in the YAML itself."""

from pathlib import Path

import pytest
import yaml

from yrunner.recipe import yaml_tree as document
from yrunner.recipe.yaml_tree import SourceLocation, find, plain, read_document, read_plain_scalar

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(params=["parser in C", "parser in Python"])
def either_parser(request, monkeypatch):
    if request.param == "parser in Python":
        monkeypatch.setattr(document, "_loader_class", lambda: yaml.SafeLoader)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("this PyYAML has no parser in C")


@pytest.mark.parametrize("name", sorted(path.stem for path in ASSETS.glob("*.yaml")))
def test_every_broken_recipe_gives_its_lines_and_sentences(name, problems, either_parser):
    expected = (ASSETS / f"{name}.errors").read_text().splitlines()
    assert problems((ASSETS / f"{name}.yaml").read_bytes()) == expected


ALIGN = (
    "this line is not aligned with the lines above it, or text follows the closing quote of a "
    "value; indent all keys of a section alike"
)
TOO_DEEP = "nested more than 30 levels deep; flatten it"
TAG = 'a word that begins with "!" is a YAML tag; put it in quotes'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a: "x\nb: 1\n', '1:4: the quote " opened here is never closed'),
        ("a: 'x\nb: 1\n", "1:4: the quote ' opened here is never closed"),
        (
            "a: [1, 2\nb: 3\n",
            '1:4: the "[" opened here has no "]", or a comma is missing; add it',
        ),
        (
            "a: {x: 1\nb: 3\n",
            '1:4: the "{" opened here has no "}", or a comma is missing; add it',
        ),
        ("a:\n\tb: 1\n", "2:1: this line is indented with a tab; use spaces, two per level"),
        ("a:\n  \tb: 1\n", "2:3: this line is indented with a tab; use spaces, two per level"),
        (
            "a: b: c\n",
            '1:5: ":" is not allowed here; put a value that contains ": " in quotes, and indent '
            "all keys of a section alike",
        ),
        ("a: 1\nfoo\nb: 2\n", '2:1: this line has no ":"; write "key: value"'),
        ("a:\n    b: 1\n  c: 2\n", f"3:3: {ALIGN}"),
        ('a: "x" y\n', f"1:8: {ALIGN}"),
        ("a: @x\n", '1:4: text cannot begin with "@"; put it in quotes'),
        ("a: `x`\n", '1:4: text cannot begin with "`"; put it in quotes'),
        (
            "a: *\n",
            '1:5: "*" and "&" have a meaning in YAML; put text that begins with one in quotes',
        ),
        ("a: ]\n", "1:4: a value is missing here, or a character is not needed; check the line"),
        (
            "a: - b\n",
            '1:4: a list cannot begin on the line of its key; put each "- " on a new line',
        ),
        ("a: !e!x 1\n", f"1:4: {TAG}"),
        ("%YAML 3.0\n---\na: 1\n", "1:1: unknown YAML version; remove the %YAML line"),
        ("a: \x01\n", "1:4: YAML does not allow the invisible character U+0001; remove it"),
        ("a: " + "[" * 100_000, f"1:33: {TOO_DEEP}"),
        ("- " * 5_000 + "x", f"1:61: {TOO_DEEP}"),
        (
            "a: *x\n",
            '1:4: a: the alias *x has no anchor; write "&x" before the value it repeats, or put '
            "the text in quotes",
        ),
        (
            "a: &a [*a]\n",
            "1:8: a.0: the alias *a refers to a value that contains it; remove it",
        ),
        ("", "1:1: the recipe is empty; `yrun init` writes examples to start from"),
        ("# nothing\n", "1:1: the recipe is empty; `yrun init` writes examples to start from"),
        ("- a\n", "1:1: the recipe is a list; write keys and values, such as name: my-run"),
        ("hi\n", "1:1: the recipe is a single value; write keys and values, such as name: my-run"),
    ],
)
def test_what_is_not_a_recipe_gives_one_sentence(text, expected, problems, either_parser):
    assert problems(text) == [f"recipe.yaml:{expected}"]


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        (
            "seed: !!python/object/apply:os.system [ls]\n",
            "7:7: seed: the tag !!python/object/apply:os.system is not allowed in a recipe; "
            "remove it",
        ),
        ("1: 2\n", '7:1: the key 1 is not text; put it in quotes: "1"'),
        ("on: 2\n", '7:1: the key on is not text; put it in quotes: "on"'),
        ("? [a]\n: 2\n", "7:3: a key must be text; write a name"),
        ("name: b\n", "7:1: name: this key is given twice, first on line 1; remove one of them"),
        (
            "---\nname: b\n",
            '7:1: a second YAML document begins here; a recipe is only one, remove the "---"',
        ),
        (
            "train: {<<: 3}\n",
            '7:13: train: only a section can be merged with "<<"; write "<<: *name"',
        ),
    ],
)
def test_a_fault_of_yaml_beside_valid_keys_is_reported_alone(
    addition, expected, valid, problems, either_parser
):
    assert problems(valid + addition) == [f"recipe.yaml:{expected}"]


def test_a_chain_of_aliases_cannot_hide_its_depth(problems):
    chain = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(300))
    assert problems(chain) == [f"recipe.yaml:29:12: {TOO_DEEP}"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_recipe_with_a_byte_order_mark_is_read(encoding, valid, problems):
    assert problems(valid.encode(encoding)) == []


def test_utf_16_without_its_mark_is_named(valid, problems):
    assert problems(valid.encode("utf-16-le")) == [
        "recipe.yaml:1:2: a NUL character, so this is not UTF-8 text; save the file as UTF-8; "
        "if it is utf-16-le: iconv -f utf-16-le -t utf-8 recipe.yaml > utf8-recipe.yaml"
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("-3", -3),
        ("8_192", 8192),
        ("0x10", 16),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("Null", None),
        ("nULL", "nULL"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("9" * 5000, "9" * 5000),
        (".", "."),
        ("1.2.3", "1.2.3"),
    ],
)
def test_words_mean_what_yaml_1_2_says_and_yes_is_true(text, value):
    assert read_plain_scalar(text) == value
    assert type(read_plain_scalar(text)) is type(value)


def test_aliases_and_merges_are_written_out_and_own_keys_win(either_parser):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n"
    root, faults = read_document(text, SourceLocation(0, 1, 1, "recipe.yaml"))
    assert plain(root) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert faults == []
    assert str(find(root, ("c",))[0].location) == "recipe.yaml:3:4"
    assert str(find(root, ("b", "x"))[0].location) == "recipe.yaml:1:11"


def test_text_in_quotes_stays_text(either_parser):
    root, _ = read_document(
        'a: "1e-4"\nb: !!str 3\nc: ! no\n', SourceLocation(0, 1, 1, "recipe.yaml")
    )
    assert plain(root) == {"a": "1e-4", "b": "3", "c": "no"}
