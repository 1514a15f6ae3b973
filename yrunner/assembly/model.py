"""The model that a run starts from; when that is another recipe's result, make sure it exists.

The result of a recipe's run, for the commands that come after training.

What tells one model from another, without reading all of its weights.

The tokenizer of a recipe, also before its base has been trained.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from yrunner.assembly.dataset import model_texts
from yrunner.assembly.identity import changes_since
from yrunner.errors import RunError
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import explain_failure
from yrunner.models.hub import only_cached
from yrunner.models.load import (
    check_folder,
    choose_dtype,
    load_model,
    load_tokenizer,
    set_chat_template,
)
from yrunner.models.scratch import train_tokenizer
from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir


def stale_base(recipe: Recipe) -> tuple[Recipe, str] | None:
    """The recipe of the base, and why it has to be trained first; None when nothing has to."""
    path = base_recipe_path(recipe)
    if path is None:
        return None
    base = load_recipe(path)
    run_dir = RunDir(base.run_folder)
    if not run_dir.is_used():
        return base, f"{base.name} is the base and has not been trained yet: training it first"
    if not run_dir.fingerprint.exists():
        return base, f"{base.name} is the base and was not finished: training it first"
    changes = changes_since(run_dir, base)
    if changes:
        return (
            base,
            f"{base.name} is the base and has changed ({', '.join(changes)}): rebuilding it",
        )
    if not run_dir.is_finished():
        return base, f"{base.name} is the base and was not finished: going on with it"
    return None


def base_source(recipe: Recipe) -> str:
    """Folder or Hub id of the base, which has to exist by now."""
    path = base_recipe_path(recipe)
    if path is None:
        assert recipe.model.base is not None, "a model from scratch has no base"
        return recipe.model.base
    return str(RunDir(load_recipe(path).run_folder).model)


def finished_run(recipe: Recipe) -> RunDir:
    """The run folder of a recipe. Raises `RunError` where its model is not there yet."""
    run_dir = RunDir(recipe.run_folder)
    if not run_dir.is_finished():
        raise RunError(
            f"{recipe.name} has no result in {run_dir.folder}", remedy="train it first: yrun train"
        )
    return run_dir


def tuned_tokenizer(run_dir: RunDir) -> Any:
    """The tokenizer that was saved with the model, chat template included."""
    return load_tokenizer(str(run_dir.model))


def tuned_model(recipe: Recipe, run_dir: RunDir) -> Any:
    """The trained model; an adapter is merged into its base, in memory."""
    return load_finished(recipe, str(run_dir.model))


def checkpoint_model(recipe: Recipe, run_dir: RunDir, step: int) -> Any:
    """The model as it was after so many updates; an adapter is merged into its base, in memory."""
    return load_finished(recipe, str(run_dir.checkpoint(step)))


def base_model(recipe: Recipe) -> Any:
    """The model as it was before training."""
    return load_finished(recipe, base_source(recipe))


def load_finished(recipe: Recipe, source: str) -> Any:
    """The model at a folder or Hub id, on the device, as the recipe wants it loaded."""
    model = load_model(
        source,
        dtype=choose_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


NUM_PIECES = 256
PIECE_BYTES = 4096
PLACES = ("base_model_name_or_path", "_name_or_path")
"""Keys of a config that say where a model stands, which may change without changing it."""


def model_key(source: str | Path) -> str:
    """A hash of a model, 32 hexadecimal digits: what is measured with it may be kept by this key.

    Of a folder: its config, its own code, and the name, size and a sample of every file of weights,
    a mebibyte at the most. Of a Hub id: its commit, which is asked for where the Hub is within
    reach. Of an adapter: itself and its base. Raises `ModelError` where there is no model.
    """
    with explain_failure(str(source)):
        adapter = find_adapter(str(source))
        if adapter is not None:
            parts = [_folder_parts(adapter), model_key(read_base(adapter))]
        elif Path(source).is_dir():
            check_folder(Path(source))
            parts = [_folder_parts(Path(source))]
        else:
            parts = [str(source), _commit(str(source))]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _folder_parts(folder: Path) -> dict[str, Any]:
    """What makes the model of a folder, by the name of the file."""
    configs = {
        file.name: _without_places(json.loads(file.read_text("utf-8")))
        for name in ("config.json", "adapter_config.json")
        if (file := folder / name).is_file()
    }
    code = {file.name: file.read_text("utf-8") for file in folder.glob("*.py")}
    weights = {
        file.name: [file.stat().st_size, _sample(file)] for file in folder.glob("*.safetensors")
    }
    return configs | code | weights


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in PLACES}


def _sample(file: Path) -> str:
    """A hash of pieces that lie evenly over a file, or of all of a small one."""
    sample = blake2b(digest_size=16)
    with file.open("rb") as weights:
        for start in _starts(file.stat().st_size):
            weights.seek(start)
            sample.update(weights.read(PIECE_BYTES))
    return sample.hexdigest()


def _starts(size: int) -> Iterator[int]:
    if size <= NUM_PIECES * PIECE_BYTES:
        yield from range(0, size, PIECE_BYTES)
    else:
        for piece in range(NUM_PIECES):
            yield piece * (size - PIECE_BYTES) // (NUM_PIECES - 1)


def _commit(source: str) -> str:
    """The commit of a Hub id: the cache keeps each in a folder of that name."""
    config = cached_file(source, "config.json", local_files_only=only_cached(source))
    return Path(config).parent.name


def recipe_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that the recipe's run uses.

    That of a new model is trained on its texts, which takes seconds and has one result; so a recipe
    can be checked whose base is a recipe without a result yet.
    """
    scratch = recipe.model.scratch
    if scratch is not None:
        return train_tokenizer(model_texts(recipe), scratch.vocab_size)
    stale = stale_base(recipe)
    if stale is not None:
        tokenizer = recipe_tokenizer(stale[0])
        if recipe.model.chat_template is not None:
            set_chat_template(tokenizer, recipe.model.chat_template)
        return tokenizer
    return load_tokenizer(
        base_source(recipe),
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
