"""What libraries say where nothing is wrong, and nobody has to hear."""

import logging
import warnings
from functools import partial

NO_NEWS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}
"""Beginnings or parts of such messages, by the name of the logger."""


def hide_what_is_no_news() -> None:
    """Let these messages, and no others, be dropped."""
    for name, message in NO_NEWS.items():
        logging.getLogger(name).addFilter(partial(_is_news, message))
    # DeepSpeed calls what torch will rename one day.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)


def _is_news(known: str, record: logging.LogRecord) -> bool:
    return known not in str(record.msg)
