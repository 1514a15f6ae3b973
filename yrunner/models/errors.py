"""Turn what transformers raises for a bad source into a sentence with a remedy.

Keep transformers and peft from writing on the screen while they load or save.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from yrunner.errors import MissingError, ModelError

# Words of transformers' ValueError or OSError -> what is wrong, what to do. It raises no types of
# its own, so only the words tell the cases apart (transformers 5.23).
KNOWN_FAILURES = (
    (
        "trust_remote_code",
        "comes with Python code of its own",
        "read that code, then set model.trust_remote_code: true",
    ),
    (
        "does not recognize this architecture",
        "has an architecture that the installed transformers does not know",
        "run pip install --upgrade transformers",
    ),
    ("Should have a `model_type`", "names no model_type in its config.json", "add it"),
    (
        "Unrecognized configuration class",
        "is no causal language model",
        "choose a model that writes text, such as Qwen3",
    ),
    (
        "couldn't connect",
        "is no folder here, and the Hub cannot be reached nor is it in the cache",
        "check the spelling and the connection, or give the path of a folder",
    ),
    (
        "gated repo",
        "is a gated model of the Hub",
        "ask for access on its page, then: hf auth login",
    ),
    (
        "not a valid model identifier",
        "is neither a folder here nor a model of the Hub",
        "check the spelling; for a private model: hf auth login",
    ),
    (
        "Repo id must",
        "is neither a folder here nor the name of a model of the Hub",
        "check the path; relative paths start at the recipe",
    ),
    (
        "model.safetensors",
        "has no weights as safetensors",
        "pickled weights (.bin) can run code and are not read; convert them to safetensors",
    ),
    ("valid JSON", "has a config.json that is not JSON", "download or save the model again"),
    (
        "Couldn't instantiate the backend tokenizer",
        "has no tokenizer that can be read",
        "add tokenizer.json, or pip install sentencepiece if it has a tokenizer.model",
    ),
)


@contextmanager
def explain_failure(source: str) -> Iterator[None]:
    """Raise ModelError or MissingError, naming `source`, for what loading it raises inside."""
    try:
        yield
    except ImportError as error:
        flash = "flash" in str(error).lower()
        raise MissingError(
            f"{source} needs a package that is not installed ({_first_line(error)})",
            remedy="run pip install flash-attn, or set model.attention: sdpa"
            if flash
            else "install the package that the message names",
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
def quiet_libraries(*, keep_progress: bool = False) -> Iterator[None]:
    """Silence log lines, Python warnings and, unless `keep_progress`, progress bars.

    What they warn of (weights that are missing, adapters that do not fit) is checked by the
    callers, who refuse with a sentence instead. The settings are global, so they are put back.
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
