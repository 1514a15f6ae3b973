"""Build or merge a model with every weight whole, also where ZeRO-3 would cut each one at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """DeepSpeed cuts them when training begins; until then each process has all of them.

    For models that are built anew and looked at, and for adapters that are merged. A plain base is
    cut while it is loaded, which no process could hold whole.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
