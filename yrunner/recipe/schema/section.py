"""The base class of recipe sections, and the types of their paths and model names."""

import os
import re
import shlex
from glob import escape, iglob
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

# Allowed by the Hub: letters, digits, underscores, and single dots and dashes between them.
_HUB_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-])){0,95}(?<![.-])"
_HUB_ID = re.compile(rf"{_HUB_WORD}(/{_HUB_WORD})?")
_HUB_GGUF = re.compile(rf"{_HUB_WORD}/{_HUB_WORD}(/[^/\\\0]+)*/[^/\\\0]+\.gguf")

MODELSCOPE = "modelscope:"
"""Begins the name of a model of ModelScope."""
FETCHED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file that `yrun fetch` gets."""


def how_to_fetch(path: str | Path) -> str | None:
    """The command that gets a missing model file; None for a file that `yrun fetch` has not."""
    if os.path.basename(path) != FETCHED_GGUF:
        return None
    folder = os.path.relpath(os.path.dirname(path) or ".")
    return f"yrun fetch {shlex.quote(folder)}"


def is_recipe_path(text: str) -> bool:
    """Whether a path is a recipe, by its suffix."""
    return text.endswith((".yaml", ".yml"))


def _from_recipe_folder(path: str | Path, info: ValidationInfo) -> Path:
    assert info.context is not None, "only load.py knows the recipe's folder"
    # os.path instead of Path's own methods: those raise for "~nobody" and over-long names.
    return Path(info.context["folder"], os.path.expanduser(path))


def existing_file(path: Path, info: ValidationInfo) -> Path:
    """Resolve a path relative to the recipe's folder; it must be a file.

    Only `load.py` passes the folder, as the validation context; without it paths stay unchanged.
    """
    if info.context is None:
        return path
    full = _from_recipe_folder(path, info)
    if os.path.isdir(full):
        raise ValueError(f"{full} is a folder, but a file is needed; name a file in it")
    if not os.path.exists(full):
        raise ValueError(f"there is no file {full}; paths are relative to the recipe file")
    return full.resolve()


def _existing_place(path: Path, info: ValidationInfo) -> Path:
    """Resolve a file, a folder or a glob with a match, relative to the recipe's folder."""
    if info.context is None:
        return path
    full = _from_recipe_folder(path, info)
    if os.path.exists(full):
        return full.resolve()
    written = os.path.expanduser(path)
    if escape(written) == written or "\0" in written:
        raise ValueError(f"there is no file {full}; paths are relative to the recipe file")
    # Glob characters in the name of the recipe's own folder are literal.
    pattern = Path(escape(str(info.context["folder"])), written)
    if next(iglob(str(pattern), recursive=True), None) is None:
        raise ValueError(f"no file matches {full}; paths are relative to the recipe file")
    return pattern.resolve()


def _hub_id(text: str) -> str:
    if not _HUB_ID.fullmatch(text):
        raise ValueError(f'"{text}" is not a Hub id; write "organisation/name"')
    return text


def _model_source(text: str, info: ValidationInfo) -> str:
    """An absolute folder or an unchanged Hub id; without `load.py`'s context, the text itself."""
    if info.context is None:
        return text
    full = _from_recipe_folder(text, info)
    if os.path.isdir(full):
        return str(full.resolve())
    if os.path.exists(full):
        raise ValueError(f"{full} is a file; give the model's folder")
    if text.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {full}; paths are relative to the recipe file")
    if not _HUB_ID.fullmatch(text):
        raise ValueError(
            f'"{text}" is neither a folder, relative to the recipe file, nor a Hub id; '
            'write "./folder" or "organisation/name"'
        )
    return text


def _base(text: str, info: ValidationInfo) -> str:
    """A recipe or GGUF file is an absolute path; one on the Hub or ModelScope stays unchanged."""
    if text.startswith(MODELSCOPE):
        name, *_ = text.removeprefix(MODELSCOPE).partition("@")
        if "/" not in name or not _HUB_ID.fullmatch(name) or text.endswith("@"):
            raise ValueError(f'"{text}" is not a model of ModelScope; write "{MODELSCOPE}org/name"')
        return text
    if info.context is None or not text.endswith((".yaml", ".yml", ".gguf")):
        return _model_source(text, info)
    full = _from_recipe_folder(text, info)
    if _HUB_GGUF.fullmatch(text) and not full.exists():
        return text
    command = how_to_fetch(full)
    if command and not os.path.exists(full):
        raise ValueError(f"there is no file {full}; run {command}")
    return str(existing_file(Path(text), info))


def _sort_recipe(path: Path, info: ValidationInfo) -> Path:
    if not is_recipe_path(str(path)):
        raise ValueError(f'"{path}" is not a recipe; name a .yaml file with the data to sort')
    return existing_file(path, info)


RecipeFile = Annotated[Path, AfterValidator(existing_file)]
SortRecipe = Annotated[Path, AfterValidator(_sort_recipe)]
RecipePlace = Annotated[Path, AfterValidator(_existing_place)]
HubId = Annotated[str, AfterValidator(_hub_id)]
ModelSource = Annotated[str, Field(min_length=1), AfterValidator(_model_source)]
BaseSource = Annotated[str, Field(min_length=1), AfterValidator(_base)]


class Section(BaseModel):
    """A section of a recipe: frozen, without unknown keys, and with finite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
