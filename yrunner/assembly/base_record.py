"""base.json: which model a run started from, so that its adapter goes onto no other."""

from pathlib import Path

from yrunner.assembly.model import base_source, model_key
from yrunner.console import warn
from yrunner.errors import RunError
from yrunner.models.local import local_folder
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, hash_files, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def base_record(recipe: Recipe) -> dict[str, object]:
    """Where the base is, its key, and a hash of each file that makes its tokens."""
    source = base_source(recipe)
    folder = local_folder(source)
    found = [folder / name for name in TOKENIZER_FILES] if folder is not None else []
    hashes = hash_files(file for file in found if file.is_file())
    tokenizer = {Path(name).name: value for name, value in hashes.items()}
    return {"base": source, "key": model_key(source), "tokenizer": tokenizer}


def check_base(recipe: Recipe, run_dir: RunDir) -> str:
    """The key of the base, which has to be the one that the run started from.

    Raises `RunError` where it is another.
    """
    now = base_record(recipe)
    if not run_dir.base.exists():
        warn(f"{run_dir.folder} has no base.json: whether {now['base']} is its base is not known")
        return str(now["key"])
    then = read_json(run_dir.base)
    if {**then, "base": None} == {**now, "base": None}:
        return str(now["key"])
    part = "weights or config" if then["key"] != now["key"] else "tokenizer"
    raise RunError(
        f"{recipe.name} was trained on {then['base']} with the key {then['key']}, but the base is "
        f"now {now['base']} with the key {now['key']}: another {part}",
        remedy="bring that base back, or train anew with yrun train --overwrite",
    )
