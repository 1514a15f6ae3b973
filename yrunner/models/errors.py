"""Turn errors of loading into sentences with a remedy; silence transformers and peft."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from yrunner.errors import MissingError, ModelError

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
    (
        "gated repo",
        "is a gated model on the Hub",
        "request access on its page, then: hf auth login",
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


@contextmanager
def explain_failure(source: str) -> Iterator[None]:
    """Turn what loading `source` raises into a ModelError or MissingError."""
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
        raise ModelError(
            f"{source} lacks a file ({_first_line(error)})", remedy="download the model again"
        ) from error
    except (OSError, ValueError) as error:
        for words, message, remedy in KNOWN_FAILURES:
            if words in str(error):
                raise ModelError(f"{source} {message}", remedy=remedy) from error
        raise ModelError(
            f"{source} cannot be loaded ({_first_line(error)})", remedy="check model.base"
        ) from error


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
