"""A key that tells one model from another, without reading all of its weights."""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import explain_failure
from yrunner.models.hub import only_cached
from yrunner.models.load import check_folder

NUM_PIECES = 256
PIECE_BYTES = 4096
PLACES = ("base_model_name_or_path", "_name_or_path")
"""Config keys that name the location of a model, which does not identify it."""


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
        file.name: [file.stat().st_size, sample_of(file)] for file in folder.glob("*.safetensors")
    }
    return configs | code | weights


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in PLACES}


def sample_of(file: Path) -> str:
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
