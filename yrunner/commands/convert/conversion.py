"""A conversion under way: the settings that are left, the recipe so far, and the list of keys."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from yrunner.recipe.messages import recipe_json_schema
from yrunner.recipe.yaml_tree import read_plain_scalar

KNOWN_KEYS = Path(__file__).with_name("known_keys.json")
"""Every key that each tool declares, collected by `benchmarks/convert.py --keys`."""
PASS_ON_TRANSFORMERS = ("LLaMA-Factory", "TRL", "ms-swift")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")
OFF = (None, False, "", 0, "none", "no", "false")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_PARENTS = 3


class Outcome(StrEnum):
    """What became of a key; the four parts of the list."""

    CARRIED = "carried over"
    CHANGED = "changed"
    WITHOUT = "without counterpart"
    IGNORED = "ignored by the old tool itself"


@dataclass(frozen=True)
class Entry:
    """A key of the old settings: its value there, its place in the recipe, and a note."""

    key: str
    value: Any
    outcome: Outcome
    place: str = ""
    note: str = ""


@dataclass
class Conversion:
    """Settings of another tool on their way into a recipe; each key leaves `left` once."""

    tool: str
    left: dict[str, Any]
    folder: Path
    """The folder of the settings file."""
    recipe_folder: Path
    """The folder of the recipe, to which its paths are relative."""
    values: dict[str, Any] = field(default_factory=dict)
    """The recipe so far, by dotted key."""
    comments: dict[str, str] = field(default_factory=dict)
    """The comment behind a dotted key of the recipe."""
    entries: list[Entry] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    """Keys of the recipe that write out a default of the old tool."""
    obstacles: list[str] = field(default_factory=list)
    """Why no recipe can be written."""
    missing: list[str] = field(default_factory=list)
    """Paths that do not exist here."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that is left; the default if it is missing or empty."""
        value = self.left.get(key)
        return default if value is None else value

    def carry(self, key: str, place: str, value: Any = ..., how: str = "") -> bool:
        """Set `place` to the value of `key`, or to `value`; `how` says what changed.

        False if the key is not there, or is empty and so leaves the default.
        """
        if key not in self.left:
            return False
        given = self.left[key]
        if given is None:
            self.same(key, "empty, so the default")
            return False
        self.put(place, given if value is ... else value, how)
        self.record(key, Outcome.CHANGED if how else Outcome.CARRIED, place, how)
        return True

    def put(self, place: str, value: Any, comment: str = "") -> None:
        """Set a key of the recipe, with a comment behind it."""
        self.values[place] = value
        if comment:
            self.comments[place] = comment

    def same(self, key: str, note: str) -> None:
        """The key needs no line in the recipe, because it is so here anyway."""
        self.record(key, Outcome.CARRIED, note=note)

    def changed(self, key: str, note: str, place: str = "") -> None:
        """The key has an effect on the recipe that `note` describes."""
        self.record(key, Outcome.CHANGED, place, note)

    def without(self, key: str, remedy: str) -> None:
        """Nothing here does what the key did."""
        self.record(key, Outcome.WITHOUT, note=remedy)

    def ignored(self, key: str, why: str) -> None:
        """The old tool did nothing with the key either."""
        self.record(key, Outcome.IGNORED, note=why)

    def record(self, key: str, outcome: Outcome, place: str = "", note: str = "") -> None:
        """Move a key from `left` to the list, a section key by key."""
        if key in self.left:
            value = self.left.pop(key)
            self.entries += [
                Entry(name, inner, outcome, place, note) for name, inner in leaves(key, value)
            ]

    def fill(self, place: str, value: Any, why: str) -> None:
        """Write out a default of the old tool that differs from ours, unless `place` is set."""
        if place not in self.values:
            self.put(place, value, why)
            self.defaults.append(place)

    def revise(self, place: str, value: Any, how: str) -> None:
        """Change what a key was carried over to: it does not go with another one here."""
        if value is None:
            self.values.pop(place, None)
            self.comments.pop(place, None)
        else:
            self.put(place, value, how)
        self.entries = [
            Entry(it.key, it.value, Outcome.CHANGED, it.place, how) if it.place == place else it
            for it in self.entries
        ]

    def rest(self, remedy: Callable[[str], str]) -> None:
        """Sort the keys that nothing has taken; `remedy`: what to do instead of one."""
        known = known_keys(self.tool)
        for key in list(self.left):
            value = self.left[key]
            if key not in known:
                self.ignored(key, f"unknown to {self.tool}{_meant(key, known)}")
            elif value in OFF or value in ([], {}):
                self.same(key, "off, as here")
            else:
                self.without(key, remedy(key))

    def find(self, text: str) -> Path | None:
        """An existing path, relative to where the command runs or to the settings file."""
        path = Path(os.path.expanduser(text))
        folders = [Path.cwd(), self.folder, *list(self.folder.resolve().parents)[:_PARENTS]]
        for folder in folders:
            if os.path.exists(folder / path):
                return Path(os.path.normpath(folder / path))
        return None

    def written(self, path: Path) -> str:
        """A path as the recipe names it: relative to the recipe, unless that is far away."""
        relative = os.path.relpath(path.absolute(), self.recipe_folder.absolute())
        return str(path.absolute()) if relative.startswith("../../..") else relative

    def model(self, text: Any) -> str:
        """The model of a path or Hub id."""
        text = str(text)
        found = self.find(text)
        if found is not None:
            return self.written(found) if "/" in self.written(found) else f"./{found.name}"
        if not _HUB_ID.fullmatch(text) and not re.fullmatch(r"[\w][\w.-]*", text):
            self.missing.append(text)
        return text

    def data(self, text: str) -> dict[str, Any]:
        """The start of an entry of `data.train`: a file or folder that is here, or a Hub id."""
        found = self.find(text)
        if found is not None:
            return {"file": self.written(found)}
        if _HUB_ID.fullmatch(text) and not text.endswith(DATA_SUFFIXES):
            return {"hub": text}
        self.missing.append(text)
        return {"file": text}


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The keys inside a section with their values: `fsdp_config.version`, `datasets[0].path`."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(f"{key}[{index}]", item)
    else:
        yield key, value


@cache
def known_keys(tool: str) -> frozenset[str]:
    """The keys that a tool declares."""
    listed = json.loads(KNOWN_KEYS.read_text("utf-8"))
    names = " ".join(listed[tool]).split()
    if tool in PASS_ON_TRANSFORMERS:
        names += " ".join(listed["transformers"]).split()
    return frozenset(names)


@cache
def _schema() -> dict[str, Any]:
    return recipe_json_schema()


@cache
def choices(*path: str) -> tuple[str, ...]:
    """The words that a key of the recipe accepts: `choices("train", "optimizer")`."""
    schema = _schema()
    part: dict[str, Any] = schema
    for name in path:
        for section in _sections(part, schema):
            if name in section.get("properties", {}):
                part = section["properties"][name]
                break
        else:
            return ()
    return tuple(word for section in _sections(part, schema) for word in section.get("enum", ()))


@cache
def has_key(*path: str) -> bool:
    """Whether recipes have this key."""
    schema = _schema()
    parts = [schema]
    for name in path:
        sections = [section for part in parts for section in _sections(part, schema)]
        found = [
            section["properties"][name]
            for section in sections
            if name in section.get("properties", {})
        ]
        if not found:
            return False
        parts = found
    return True


def _sections(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The members of a schema's unions, references followed."""
    if "$ref" in part:
        yield from _sections(schema["$defs"][part["$ref"].rsplit("/", 1)[1]], schema)
    for option in (*part.get("anyOf", ()), *part.get("oneOf", ())):
        yield from _sections(option, schema)
    yield dict(part)


def number(value: Any) -> Any:
    """A number that the file writes as text: "1e-4"."""
    return read_plain_scalar(value.strip()) if isinstance(value, str) else value


def decimal(value: Any) -> Any:
    """The value as a float; one that is not a number is left for the schema to refuse."""
    value = number(value)
    return float(value) if is_number(value) else value


def is_number(value: Any) -> bool:
    """Whether a value is a number, which true is not."""
    return type(value) in (int, float)


def words(value: Any) -> list[str]:
    """A list, or a text of words between commas or blanks."""
    if isinstance(value, str):
        return [word for word in re.split(r"[,\s]+", value) if word]
    return [str(item) for item in value] if isinstance(value, Iterable) else [str(value)]


def _meant(key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.8)
    return f', did you mean "{near[0]}"?' if near else ""
