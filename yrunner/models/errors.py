"""Say what is wrong with a model's files, before and after a library does; silence libraries."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from yrunner.errors import DataError, MissingError, ModelError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer begins, which Git without LFS leaves in place of a large file."""
CONFIG_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
OLDER_TOKENIZER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files that are read where there is no tokenizer.json."""
DOWNLOAD_AGAIN = "download the model again"
# Text in transformers' ValueError or OSError -> what is wrong, what to do. Only the text tells the
# cases apart: transformers 5.23 has no exception types for them.
KNOWN_FAILURES = (
    (
        "trust_remote_code",
        "contains custom Python code",
        "read the code, then set model.trust_remote_code: true",
    ),
    (
        "does not recognize this architecture",
        "has an architecture unknown to the installed transformers",
        "run pip install --upgrade transformers",
    ),
    ("Should have a `model_type`", "names no model_type in its config.json", "add it"),
    (
        "Unrecognized configuration class",
        "is not a causal language model",
        "choose a model that generates text, such as Qwen3",
    ),
    (
        "couldn't connect",
        "is not a local folder, is not cached, and the Hub is unreachable",
        "check the spelling and the connection, or give the path of a folder",
    ),
    # Before gated repositories, which this message mentions too.
    (
        "Repository Not Found",
        "names no repository on the Hub",
        "check the spelling; for a private model: hf auth login",
    ),
    (
        "gated repo",
        "is a gated model on the Hub",
        "request access on its page, then: hf auth login",
    ),
    (
        "Entry Not Found",
        "is not a file of this model on the Hub",
        "choose one from the list of files on its page",
    ),
    (
        "not a valid model identifier",
        "is neither a local folder nor a model on the Hub",
        "check the spelling; for a private model: hf auth login",
    ),
    (
        "Repo id must",
        "is neither a local folder nor a valid Hub id",
        "check the path; relative paths start at the recipe",
    ),
    (
        "model.safetensors",
        "has no safetensors weights",
        "pickled weights (.bin) can run code and are not read; convert them to safetensors",
    ),
    ("valid JSON", "has a config.json that is not JSON", "download or save the model again"),
    (
        "Couldn't instantiate the backend tokenizer",
        "has no readable tokenizer",
        "add tokenizer.json, or pip install sentencepiece if it has a tokenizer.model",
    ),
)


def check_weight_files(folder: Path) -> None:
    """Raise `ModelError` for weight files that are missing, cut or Git LFS pointers.

    Of a model's or an adapter's folder, and only those that would be loaded. Reads only headers.
    """
    index = folder / INDEX_FILE
    for file in loaded_files(folder):
        if not file.is_file():
            raise ModelError(
                f"{folder} lacks {file.name}, which {index.name} names", remedy=DOWNLOAD_AGAIN
            )
        _check_is_downloaded(file)
        if file.suffix == ".safetensors":
            _check_is_whole(file)


def loaded_files(folder: Path) -> list[Path]:
    """The weight files of a folder that would be loaded; others may lie beside them."""
    index, whole = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if whole.is_file():
        return [whole]
    if index.is_file():
        _check_is_downloaded(index)
        return [folder / name for name in sorted(_names_of_shards(index))]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _check_text_files(folder: Path) -> None:
    """Raise `ModelError` if a config or a tokenizer's file is a Git LFS pointer or no object."""
    older = () if (folder / "tokenizer.json").is_file() else OLDER_TOKENIZER_FILES
    for name in (*CONFIG_FILES, *older):
        if (folder / name).is_file():
            _check_is_downloaded(folder / name)
            if name.endswith("config.json"):
                _check_is_object(folder / name)


def _check_is_object(file: Path) -> None:
    """Refuse a list or null; what is no JSON at all is explained by whatever reads it."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object", remedy=DOWNLOAD_AGAIN)


def _check_is_downloaded(file: Path) -> None:
    with file.open("rb") as opened:
        is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise ModelError(
            f"{file} is a Git LFS pointer of a few lines, not the file itself",
            remedy=f"run git lfs pull in {file.parent}, or download the model with hf download",
        )


def _check_is_whole(file: Path) -> None:
    """Compare the size of a safetensors file with what its header promises."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if 8 < 8 + length <= size else b""
    try:
        weights = {name: it for name, it in json.loads(header).items() if name != "__metadata__"}
        end = 8 + length + max((int(it["data_offsets"][1]) for it in weights.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{file} is cut or damaged: its {size:,} bytes have no whole header",
            remedy=DOWNLOAD_AGAIN,
        ) from error
    if size < end:
        raise ModelError(f"{file} is cut: it has {size:,} of {end:,} bytes", remedy=DOWNLOAD_AGAIN)


def _names_of_shards(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} is damaged: it has no weight_map", remedy=DOWNLOAD_AGAIN
        ) from error


@contextmanager
def explain_failure(source: str) -> Iterator[None]:
    """Turn what loading `source` raises into a ModelError or MissingError."""
    _check_text_files(Path(source))
    try:
        yield
    except ImportError as error:
        flash = "flash" in str(error).lower()
        raise MissingError(
            f"{source} needs a package that is not installed ({_first_line(error)})",
            remedy="run pip install flash-attn, or set model.attention: sdpa"
            if flash
            else "install the package named in the message",
        ) from error
    except SafetensorError as error:
        raise ModelError(
            f"{source} has a damaged safetensors file ({error})",
            remedy="download or save the model again",
        ) from error
    except StrictDataclassError as error:
        raise ModelError(
            f"{source} has a config.json with wrong values ({str(error).splitlines()[-1].strip()})",
            remedy="download or save the model again",
        ) from error
    except FileNotFoundError as error:
        raise _lacks_a_file(source, error) from error
    except (OSError, ValueError) as error:
        for words, message, remedy in KNOWN_FAILURES:
            if words in str(error):
                raise ModelError(f"{source} {message}", remedy=remedy) from error
        raise ModelError(
            f"{source} cannot be loaded ({_first_line(error)})", remedy="check model.base"
        ) from error
    except Exception as error:
        # tokenizers raises plain exceptions; transformers trips over values it does not expect.
        trips = (TypeError, LookupError, AttributeError, ArithmeticError)
        if type(error) is not Exception and not isinstance(error, trips):
            raise
        raise ModelError(
            f"{source} has a damaged config or tokenizer ({_first_line(error)})",
            remedy=DOWNLOAD_AGAIN,
        ) from error


def _lacks_a_file(source: str, error: FileNotFoundError) -> ModelError:
    if isinstance(error, LocalEntryNotFoundError):
        return ModelError(
            f"{source} is not on this machine, is not cached, and the Hub is unreachable",
            remedy="check the spelling and the connection, or give the path of a local copy",
        )
    return ModelError(
        f"{source} lacks a file ({_first_line(error)})", remedy="download the model again"
    )


@contextmanager
def about_the_teacher() -> Iterator[None]:
    """Name the key of the recipe in errors about the teacher."""
    try:
        yield
    except MissingError as error:
        raise MissingError(f"teacher.model: {error.message}", remedy=error.remedy) from error
    except (DataError, ModelError) as error:
        remedy = error.remedy.replace("model.base", "teacher.model")
        raise ModelError(f"teacher.model: {error.message}", remedy=remedy) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def silence_libraries(*, keep_progress: bool = False) -> Iterator[None]:
    """Silence log lines, Python warnings and, unless `keep_progress`, progress bars.

    Callers check what they warn of (missing weights, adapters that do not fit) and raise instead.
    The settings are global and restored afterwards.
    """
    verbosity = logging.get_verbosity()
    hides_progress = logging.is_progress_bar_enabled() and not keep_progress
    logging.set_verbosity(logging.CRITICAL)
    if hides_progress:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if hides_progress:
            logging.enable_progress_bar()
