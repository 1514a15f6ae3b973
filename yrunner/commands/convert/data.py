"""Sources of data: counts and shares, columns and roles, and templates by name."""

import json
from typing import Any

from yrunner.commands.convert.conversion import Conversion
from yrunner.console import counted
from yrunner.errors import YRunnerError
from yrunner.recipe.schema import model as sections
from yrunner.text_files import read_text

TURN_KEYS = {"role", "from", "content", "value"}
"""Names in a turn that are found without a mapping."""
SAME_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt"},
    "system": {"system"},
    "tool": {"tool", "observation"},
}
"""Roles that are found without a mapping."""
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "qwen": "chatml",
    "qwen3": "qwen3",
    "qwen3_nothink": "chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
    "mistral": "mistral",
    "mistral_small": "mistral",
    "deepseek": "deepseek",
    "deepseek3": "deepseek",
    "deepseekr1": "deepseek",
    "glm4": "glm4",
    "phi4": "phi4",
}
"""Templates of other tools, and ours with the same structure."""
FROM_THE_MODEL = ("tokenizer_default", "default", "none")


def add_source(c: Conversion, place: str, entry: dict[str, Any]) -> None:
    """Append an entry to `data.train` or `data.validation`."""
    c.values[place] = [*c.values.get(place, ()), entry]


def count_rows(c: Conversion, entry: dict[str, Any]) -> int | None:
    """Rows of a local JSON file; None for any other source."""
    path = c.find(str(entry.get("file", ""))) if "file" in entry else None
    path = path or (c.recipe_folder / str(entry.get("file")) if "file" in entry else None)
    if path is None or path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    try:
        text = read_text(path)
    except YRunnerError:
        return None
    if path.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in text.split("\n"))
    try:
        rows = json.loads(text)
    except ValueError:
        return None
    return len(rows) if isinstance(rows, list) else None


def count_or_share(c: Conversion, key: str, given: Any) -> None:
    """`data.validation_share` from a share, or from a number of rows."""
    if not isinstance(given, int | float) or given <= 0:
        return
    if given < 1:
        c.carry(key, "data.validation_share", float(given))
        return
    counts = [_used_rows(c, entry) for entry in c.values.get("data.train", ())]
    if counts and None not in counts and given < sum(number or 0 for number in counts):
        rows = sum(number or 0 for number in counts)
        c.carry(key, "data.validation_share", round(given / rows, 6), f"{given} of {rows} rows")
    else:
        there = counted(int(given), "row")
        how = f"{there} there: divide by the number of rows, which yrun check prints"
        c.carry(key, "data.validation_share", 0.05, how)


def _used_rows(c: Conversion, entry: dict[str, Any]) -> int | None:
    rows = entry.get("take") or count_rows(c, entry)
    return round(rows * entry["share"]) if rows and "share" in entry else rows


def take_rows(c: Conversion, key: str, number: Any) -> None:
    """`take` for each source, which is an error here for a file with fewer rows."""
    if type(number) is not int or number <= 0:
        return
    notes = []
    for entry in c.values.get("data.train", ()):
        rows = count_rows(c, entry)
        name = entry.get("file") or entry.get("hub")
        if rows is not None and rows <= number:
            notes.append(f"all {counted(rows, 'row')} of {name}")
        elif "take" not in entry or entry["take"] > number:
            entry["take"] = number
            notes.append(f"{counted(number, 'row')} of {name}, at random")
    c.changed(key, "; ".join(notes) or "see data.train.take", "data.train")


def template(c: Conversion, key: str, name: Any) -> None:
    """A template by its name in the old tool: ours of that name, or the model's own."""
    if not name:
        return
    name = str(name)
    path = c.find(name) if name.endswith(".jinja") else None
    if path is not None:
        c.carry(key, "model.chat_template", c.written(path))
    elif name in FROM_THE_MODEL:
        c.same(key, "the model's own, as here")
    elif TEMPLATES.get(name, name) in getattr(sections, "KNOWN_TEMPLATES", ()):
        ours = TEMPLATES.get(name, name)
        c.carry(key, "model.chat_template", ours, "" if ours == name else f"{name} there")
    else:
        c.without(
            key,
            f"the model's own template is used, not {name} of {c.tool}; for a base without one "
            "name a .jinja file in model.chat_template",
        )
