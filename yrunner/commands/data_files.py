"""The data files that a recipe names, wherever they are, and how it wants them read."""

from pathlib import Path
from typing import Literal

from yrunner.data.hub_files import hub_files
from yrunner.data.pipeline import Rules, Source
from yrunner.data.places import find_files
from yrunner.data.reading import Reading
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_data import DataFile


def recipe_sources(recipe: Recipe) -> list[Source]:
    """Training and validation data, folders and globs resolved, Hub datasets downloaded.

    Raises `DataError` where a place holds no data file.
    """
    return [
        *(_source(entry, "train") for entry in recipe.data.train),
        *(_source(entry, "validation") for entry in recipe.data.validation),
    ]


def keep_sources(recipe: Recipe) -> list[Source]:
    """The file of kept rows, where the recipe names one. Raises as `recipe_sources`."""
    file = getattr(recipe.keep, "file", None)
    return [] if file is None else [Source(tuple(find_files(file)))]


def recipe_rules(recipe: Recipe) -> Rules:
    """What the recipe makes of a row."""
    data = recipe.data
    return Rules(
        max_length=data.max_length,
        too_long=data.too_long,
        invalid=data.invalid,
        system=data.system,
        targets=data.targets,
        texts_allowed=recipe.train.stage != "sft",
    )


def data_name(entry: DataFile) -> str:
    """What a person calls this data: the file's name, or the dataset's."""
    return entry.hub or Path(entry.file or "").name


def _source(entry: DataFile, purpose: Literal["train", "validation"]) -> Source:
    if entry.hub is not None:
        files = hub_files(entry.hub, files=entry.files, revision=entry.revision)
    else:
        assert entry.file is not None, "the schema wants one of file and hub"
        files = find_files(entry.file)
    return Source(
        files=tuple(files),
        purpose=purpose,
        reading=Reading(entry.format, entry.columns, entry.document),
        take=entry.take,
        share=entry.share,
    )
