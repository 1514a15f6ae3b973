"""A recipe spoilt in any way loads, or fails with a place in every problem; nothing else."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe

WHOLE = """\
name: legal
seed: 1
model: {base: ./base, dtype: float32}
tuning:
  kind: lora
  rank: 4
  targets: [q_proj, v_proj]
data:
  system: "You are: helpful"
  train:
    - file: rows.jsonl
      columns: {instruction: question}
  validation_share: 0.1
loss: {kind: nlirg, min_lr: 5e-8}
train:
  epochs: 2
  learning_rate: 1e-4
  checkpoint: {every: 5}
  trackers: [wandb]
sort: {also: [loss], drop_above: 1e1}
eval:
  tasks: [{name: law, kind: answer, side: domain, data: rows.jsonl}]
"""
WORDS = (
    *("yes", "1e400", "-1", "''", "[]", "{}", "~", "*x", "&a [*a]", "!!set {a}", "2026-01-01"),
    *("0x", "99999999999999999999", ".nan", "|", ">-", "@", "'", '"', "[", "}", "<<", "\t", "---"),
    *("a: b", "{kind: }", "[[]]", "中文", "\u2028", "\ufeff", "\x00", "? ", "- ", "%", "#", "\\"),
)
Mutation = Callable[[random.Random, str], bytes]


def drop_a_line(chance: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    del lines[chance.randrange(len(lines))]
    return "".join(lines).encode()


def double_a_line(chance: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    lines.insert(chance.randrange(len(lines)), chance.choice(lines))
    return "".join(lines).encode()


def indent_a_line(chance: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    lines[number] = chance.choice([" ", "  ", "\t", "    "]) + lines[number]
    return "".join(lines).encode()


def misspell(chance: random.Random, text: str) -> bytes:
    position = chance.randrange(len(text) - 1)
    return (text[:position] + text[position + 1] + text[position] + text[position + 2 :]).encode()


def replace_a_value(chance: random.Random, text: str) -> bytes:
    values = list(re.finditer(r"(?<=: )[^\n]+", text))
    value = chance.choice(values)
    return (text[: value.start()] + chance.choice(WORDS) + text[value.end() :]).encode()


def insert_a_word(chance: random.Random, text: str) -> bytes:
    position = chance.randrange(len(text))
    return (text[:position] + chance.choice(WORDS) + text[position:]).encode("utf-8")


def spoil_a_byte(chance: random.Random, text: str) -> bytes:
    content = bytearray(text.encode())
    content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def cut(chance: random.Random, text: str) -> bytes:
    return text[: chance.randrange(len(text))].encode()


def nest_deeply(chance: random.Random, text: str) -> bytes:
    opening = chance.choice(["[", "{a: ", "- ", "? ", "[{a: "])
    return (text + "deep:\n  " + opening * chance.choice([10, 40, 2_000, 50_000])).encode()


def grow(chance: random.Random, text: str) -> bytes:
    line = chance.choice(["  - x\n", "  # x\n", "  - {a: 1}\n"])
    return (text + "more:\n" + line * chance.choice([1_000, 15_000, 90_000, 200_000])).encode()


def plant_a_bomb(chance: random.Random, text: str) -> bytes:
    width, height = chance.choice([(2, 40), (10, 9), (100, 3), (1, 60)])
    lines = ["a0: &a0 x\n"]
    for level in range(height):
        lines.append(f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * width)}]\n")
    return (text + "".join(lines)).encode()


MUTATIONS: list[Mutation] = [
    *(drop_a_line, double_a_line, indent_a_line, misspell, replace_a_value, replace_a_value),
    *(insert_a_word, insert_a_word, spoil_a_byte, cut, nest_deeply, grow, plant_a_bomb),
]


def assert_each_problem_has_a_place(error: RecipeError) -> None:
    for problem in error.problems:
        # A file as a whole has no line: one that is too large, for example.
        assert re.fullmatch(r"recipe\.yaml(:[1-9]\d*:[1-9]\d*)?", problem.where)
        assert problem.message and "\n" not in str(problem)
        assert not re.search(r"Input should|Value error|Extra inputs", problem.message)


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_recipe_loads_or_says_where_it_is_spoilt(seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    path = Path("recipe.yaml")
    path.write_bytes(mutate(chance, WHOLE))
    try:
        load_recipe(path)
    except RecipeError as error:
        assert_each_problem_has_a_place(error)


def test_the_recipe_that_is_spoilt_is_valid(folder: Path) -> None:
    Path("recipe.yaml").write_text(WHOLE)
    assert load_recipe(Path("recipe.yaml")).name == "legal"


@pytest.mark.parametrize("seed", range(40))
def test_a_spoilt_override_loads_or_is_named(seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    Path("recipe.yaml").write_text(WHOLE)
    keys = ["train.epochs", "tuning", "data.train.0", "data.train.x", "", "a.b.c", "name.x", "eval"]
    override = chance.choice(keys) + chance.choice(["=", "", "=="]) + chance.choice(WORDS)
    try:
        load_recipe(Path("recipe.yaml"), [override])
    except RecipeError as error:
        assert all(problem.where for problem in error.problems)
