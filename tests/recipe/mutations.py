"""Ways to break a recipe: typos of every kind, and malice."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

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


def misspell_a_key(chance: random.Random, text: str) -> bytes:
    key = chance.choice(list(re.finditer(r"\b[a-z_]{4,}(?=:)", text)))
    return (text[: key.end() - 1] + chance.choice("qxz") + text[key.end() :]).encode()


def retype_a_value(chance: random.Random, text: str) -> bytes:
    tree = yaml.safe_load(text)
    section, key = _choose_place(chance, tree)
    others = ["text", -3, 0, 2.5, True, None, [], ["a"], {}, {"a": 1}, [[]], 10**30, 1e300]
    section[key] = chance.choice(
        [value for value in others if type(value) is not type(section[key])]
    )
    return _written(tree)


def leave_the_range(chance: random.Random, text: str) -> bytes:
    tree = yaml.safe_load(text)
    numbers = [place for place in _places(tree) if isinstance(place[0][place[1]], int | float)]
    section, key = chance.choice(numbers)
    section[key] *= chance.choice([-1, -(10**12), 10**40])
    return _written(tree)


def nest_wrongly(chance: random.Random, text: str) -> bytes:
    tree = yaml.safe_load(text)
    section, key = _choose_place(chance, tree)
    other, _ = _choose_place(chance, tree)
    value = section.pop(key)
    if isinstance(other, dict):
        other[f"{key}"] = value
    else:
        other.append({f"{key}": value})
    return _written(tree)


def encode_otherwise(chance: random.Random, text: str) -> bytes:
    spoken = text.replace("helpful", "hilfreich für 法律", 1)
    encoding = chance.choice(["utf-16", "utf-16-be", "utf-32", "gb18030", "latin-1", "utf-7"])
    return spoken.encode(encoding, "replace")


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


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every section or list of a tree, with each of its keys."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    below = [tree[key] for key in keys if isinstance(tree[key], dict | list)]
    return [(tree, key) for key in keys] + [place for part in below for place in _places(part)]


def _choose_place(chance: random.Random, tree: Any) -> tuple[Any, Any]:
    return chance.choice(_places(tree))


def _written(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


MUTATIONS: list[Mutation] = [
    *(drop_a_line, double_a_line, indent_a_line, misspell, replace_a_value, replace_a_value),
    *(insert_a_word, insert_a_word, spoil_a_byte, cut, nest_deeply, grow, plant_a_bomb),
    *(misspell_a_key, retype_a_value, leave_the_range, nest_wrongly, encode_otherwise),
]


def write_surroundings(folder: Path) -> Path:
    """The files that the whole recipe names; the folder again."""
    (folder / "rows.jsonl").write_text('{"text": "hello"}\n')
    (folder / "base").mkdir()
    return folder
