"""Load a recipe with its overrides: parse, validate, and report every fault with its location."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from yrunner.console import alert
from yrunner.errors import Problem, RecipeError
from yrunner.recipe.messages import explain_errors
from yrunner.recipe.schema.model import ADAPTER_SHAPE, AdapterTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.schema.rewards import RewardModelReward
from yrunner.recipe.schema.section import is_recipe_path
from yrunner.recipe.yaml_tree import (
    FLOAT,
    MAX_DEPTH,
    KeyPath,
    Node,
    RecipeFault,
    SourceLocation,
    Unreadable,
    find,
    plain,
    read_document,
    shown,
)
from yrunner.text_files import NotUnicode, decode

DATA_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")
"""Of files that hold rows."""
MAX_BYTES = 1_000_000
RECIPE_KEYS: tuple[KeyPath, ...] = (("model", "base"), ("teacher", "model"), ("loss", "critic"))
"""Keys that may name another recipe."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with `key=value` overrides; raises one RecipeError with all problems.

    Paths are made absolute; `model.base`, `tuning.adapter` and `teacher.model` become an absolute
    path or a Hub id. If base or teacher is a recipe, it is checked too, and its problems are
    included.
    """
    return _load(Path(path), overrides, chain=())


def base_recipe_path(recipe: Recipe) -> Path | None:
    """The recipe whose result this one starts from; None if the base is a model."""
    base = recipe.model.base
    return Path(base) if base is not None and is_recipe_path(base) else None


def teacher_recipe_path(recipe: Recipe) -> Path | None:
    """The recipe whose result teaches this one; None if a model does, or nothing."""
    teacher = recipe.teacher
    return Path(teacher.model) if teacher is not None and is_recipe_path(teacher.model) else None


def judge_recipe_paths(recipe: Recipe) -> list[Path]:
    """The recipes of its reward models and of its critic's start, each once."""
    named = [each.model for each in recipe.rewards if isinstance(each, RewardModelReward)]
    critic = getattr(recipe.loss, "critic", None)
    places = [*named, *([] if critic is None else [critic])]
    return list(dict.fromkeys(place for place in places if is_recipe_path(str(place))))


def sorted_recipe_paths(recipe: Recipe) -> list[Path]:
    """The recipes whose sorted rows this one learns from, each once."""
    return list(dict.fromkeys(entry.sorted for entry in recipe.data.train if entry.sorted))


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; loading it gives an equal recipe."""
    exclude: dict[str, set[str]] = {}
    if isinstance(recipe.tuning, AdapterTuning) and recipe.tuning.adapter is not None:
        exclude["tuning"] = set(ADAPTER_SHAPE)  # these come from the adapter and may not be set
    values = recipe.model_dump(mode="json", exclude=exclude)
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=100)


def yaml_line(value: Any) -> str:
    """A value as YAML on one line, as it may stand behind a key."""
    line = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        sort_keys=False,
        width=1e9,
    )
    return line.removesuffix("\n").removesuffix("\n...")


def parse_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` overrides by dotted key. Raises RecipeError with all problems."""
    changes, faults = _parse_overrides(overrides)
    if faults:
        raise RecipeError([_problem(fault) for fault in faults])
    return {".".join(change.path): plain(change.value) for change in changes}


def check_text(text: str, path: Path, *, with_files: bool) -> None:
    """Load the text of a recipe that `path` will hold. Raises RecipeError with all problems.

    `with_files`: whether the files that it names must exist.
    """
    root, faults = read_document(text, SourceLocation(0, 1, 1, str(path)))
    assert not faults, "the text was written here"
    _, faults = _validate(root, path.parent if with_files else None)
    if faults:
        raise RecipeError([_problem(fault) for fault in faults])


class _Dumper(yaml.SafeDumper):
    """Quotes text that `read_plain_scalar` would read as a number, such as "1e-4"."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def warn_of_remote_code(recipe: Recipe) -> None:
    """Print a red warning if the recipe, or a recipe it is based on, trusts remote code."""
    if recipe.model.trust_remote_code:
        alert(
            f"model.trust_remote_code: Python code from {recipe.model.base} runs here with "
            "all your permissions"
        )
    others = (base_recipe_path(recipe), teacher_recipe_path(recipe))
    judges = judge_recipe_paths(recipe)
    for path in (*filter(None, others), *sorted_recipe_paths(recipe), *judges):
        warn_of_remote_code(load_recipe(path))


def _load(path: Path, overrides: Sequence[str], chain: tuple[Path, ...]) -> Recipe:
    """`chain` holds the recipes that this one is the base of, the outermost first."""
    changes, faults = _parse_overrides(overrides)
    below: list[Problem] = []
    try:
        root, more = _read_tree(path)
        faults.extend(more)
        root, more = _apply_overrides(root, changes)
        faults.extend(more)
        recipe, more = _validate(root, path.parent)
        known = {fault.path for fault in faults}
        faults.extend(fault for fault in more if fault.path not in known or not fault.path)
        for key in _references(root):
            more, problems = _check_reference(key, root, path, chain)
            faults.extend(more)
            below.extend(problem for problem in problems if problem not in below)
    except Unreadable as error:
        faults.append(error.fault)
        recipe = None
    problems = [
        _problem(fault) for fault in sorted(faults, key=lambda fault: fault.location)
    ] + below
    if problems:
        raise RecipeError(problems)
    assert recipe is not None, "a recipe without problems is valid"
    return recipe


def _problem(fault: RecipeFault) -> Problem:
    return Problem(str(fault.location), shown(".".join(map(str, fault.path))), fault.message)


def _read_tree(path: Path) -> tuple[Node, list[RecipeFault]]:
    start = SourceLocation(0, 1, 1, str(path))
    root, faults = read_document(_read_text(path), start)
    if root.content is None:
        message = "the recipe is empty; `yrun init` writes examples to start from"
    elif not isinstance(root.content, dict):
        shape = "a list" if isinstance(root.content, list) else "a single value"
        message = f"the recipe is {shape}; write keys and values, such as name: my-run"
    else:
        return root, faults
    raise Unreadable(RecipeFault(root.location, (), message))


def _read_text(path: Path) -> str:
    whole_file = SourceLocation(0, 0, 0, str(path))
    if os.path.isdir(path):
        raise Unreadable(
            RecipeFault(whole_file, (), "this is a folder; give the recipe file in it")
        )
    if path.suffix.lower() in DATA_SUFFIXES and path.is_file():
        message = (
            "this is data, not a recipe; for a recipe that learns from it: "
            f"yrun init --base MODEL --data {path}"
        )
        raise Unreadable(RecipeFault(whole_file, (), message))
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        message = f"no such file{_similar_file(path)}"
        raise Unreadable(RecipeFault(whole_file, (), message)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"the file cannot be read ({reason}); check its path and permissions"
        raise Unreadable(RecipeFault(whole_file, (), message)) from error
    if len(content) > MAX_BYTES:
        message = f"larger than {MAX_BYTES:,} bytes, so not a recipe; give the YAML file"
        raise Unreadable(RecipeFault(whole_file, (), message))
    return _decode(content, whole_file)


def _similar_file(path: Path) -> str:
    try:
        names = [name for name in os.listdir(path.parent) if is_recipe_path(name)]
    except (OSError, ValueError):
        return f"; the folder {path.parent} does not exist or cannot be read"
    near = get_close_matches(path.name, names, n=1)
    return f', did you mean "{path.parent / near[0]}"?' if near else "; check the path"


def _decode(content: bytes, whole_file: SourceLocation) -> str:
    try:
        return decode(content, Path(whole_file.source).name)
    except NotUnicode as error:
        location = SourceLocation(0, error.line, error.column, whole_file.source)
        raise Unreadable(RecipeFault(location, (), f"{error}; {error.remedy}")) from error


@dataclass(frozen=True)
class _Override:
    """A value and the path to set. In the path, digits are list indices."""

    path: tuple[str, ...]
    value: Node


class _DoesNotFit(Exception):
    """An override does not fit the recipe; the message says why."""


def _parse_overrides(texts: Sequence[str]) -> tuple[list[_Override], list[RecipeFault]]:
    """The valid overrides, and the faults of the others."""
    overrides: list[_Override] = []
    faults: list[RecipeFault] = []
    for turn, text in enumerate(texts, start=1):
        location = SourceLocation(turn, 0, 0, f"override {shown(text)}")
        key, equals, value_text = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            message = "not an override; write key=value, for example train.learning_rate=1e-5"
            faults.append(RecipeFault(location, (), message))
            continue
        try:
            value, value_faults = read_document(value_text, location)
        except Unreadable as error:
            faults.append(error.fault)
            continue
        overrides.append(_Override(path, replace(value, key_location=location)))
        faults.extend(replace(fault, path=(*path, *fault.path)) for fault in value_faults)
    return overrides, faults


def _apply_overrides(root: Node, overrides: Sequence[_Override]) -> tuple[Node, list[RecipeFault]]:
    """The recipe with the overrides applied in order; one that does not fit becomes a fault."""
    faults = []
    for override in overrides:
        try:
            root = _put(root, override.path, override.value, ())
        except _DoesNotFit as error:
            faults.append(RecipeFault(override.value.location, override.path, str(error)))
    return root, faults


def _put(node: Node, path: tuple[str, ...], value: Node, above: KeyPath) -> Node:
    """A copy of `node` with `value` at `path`; missing sections and lists are created.

    Copies, because an alias can put one node at several places in the recipe.
    """
    if not path:
        return replace(value, key_location=value.location)
    part, rest = path[0], path[1:]
    content = node.content
    if content is None:
        content = [] if part == "0" else {}
    missing = Node(None, value.location, key_location=value.location)
    if isinstance(content, dict):
        child = _put(content.get(part, missing), rest, value, (*above, part))
        return replace(node, content={**content, part: child})
    if isinstance(content, list):
        index = _list_index(part, len(content), above)
        child = _put(content[index] if index < len(content) else missing, rest, value, above)
        return replace(node, content=[*content[:index], child, *content[index + 1 :]])
    owner = ".".join(str(key) for key in above)
    raise _DoesNotFit(f'"{owner}" is a single value and has no "{part}"; set "{owner}" itself')


def _list_index(part: str, length: int, above: KeyPath) -> int:
    owner = ".".join(str(key) for key in above)
    if not (part.isascii() and part.isdigit() and len(part) < 6 and int(part) <= length):
        raise _DoesNotFit(
            f'"{owner}" is a list of length {length}; indices start at 0, '
            f"{owner}.{length} appends an item"
        )
    return int(part)


def _validate(root: Node, folder: Path | None) -> tuple[Recipe | None, list[RecipeFault]]:
    # Validate as strict JSON: text is accepted for a path, but not for a number, and true is
    # not 1. The tree has already turned 1e-4 into a number.
    text = json.dumps(plain(root))
    try:
        context = None if folder is None else {"folder": folder.resolve()}
        recipe = Recipe.model_validate_json(text, strict=True, context=context)
    except ValidationError as error:
        return None, explain_errors(error.errors(include_url=False), root)
    return recipe, []


def _references(root: Node) -> list[KeyPath]:
    """The places where a recipe may name another one: models, and rows to sort."""
    found = list(RECIPE_KEYS)
    lists: tuple[tuple[KeyPath, str], ...] = (
        (("data", "train"), "sorted"),
        (("rewards",), "model"),
    )
    for above, key in lists:
        node, whole = find(root, above)
        entries = node.content if whole and isinstance(node.content, list) else []
        found += [(*above, number, key) for number in range(len(entries))]
    return found


def _check_reference(
    key: KeyPath, root: Node, path: Path, chain: tuple[Path, ...]
) -> tuple[list[RecipeFault], list[Problem]]:
    """Faults in the reference to another recipe, and the problems of that recipe itself."""
    node, whole = find(root, key)
    base = node.content
    if not whole or not isinstance(base, str) or not is_recipe_path(base):
        return [], []
    base_path = Path(os.path.normpath(path.parent / os.path.expanduser(base)))
    if not os.path.isfile(base_path):
        return [], []  # already reported by the schema
    chain = (*chain, path)
    followed = [recipe.resolve() for recipe in chain]
    if base_path.resolve() in followed:
        cycle = [*chain[followed.index(base_path.resolve()) :], base_path]
        names = " -> ".join(recipe.name for recipe in cycle)
        message = f"the base recipes form a cycle ({names}); use a model as the base of one"
        if key == RECIPE_KEYS[1]:
            message = f"the recipes form a cycle ({names}); use another teacher"
        if key[0] in ("rewards", "loss"):
            message = f"the recipes form a cycle ({names}); name another reward model"
        if key[-1] == "sorted":
            message = f"the sorted recipes form a cycle ({names}); name the file of one instead"
        return [RecipeFault(node.location, key, message)], []
    try:
        _load(base_path, (), chain)
    except RecipeError as error:
        return [], error.problems
    return [], []
