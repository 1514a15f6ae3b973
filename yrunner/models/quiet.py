"""Keep transformers and peft from writing on the screen while they load or save."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


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
