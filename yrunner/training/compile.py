"""`train.torch_compile`: compile a model's layers for the time of the training."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from yrunner.errors import MissingError
from yrunner.losses.head_call import replaced_forward


def check_compiler() -> None:
    """Raise `MissingError` where torch.compile could not build its kernels on this machine."""
    parts = {
        "g++": shutil.which(os.environ.get("CXX", "g++")) is not None,
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    missing = [name for name, is_there in parts.items() if not is_there]
    if missing:
        raise MissingError(
            f"train.torch_compile needs a compiler: this machine lacks {' and '.join(missing)}",
            remedy="run apt-get install g++ python3-dev, or set train.torch_compile=false",
        )


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """Run the layers of a model compiled, for batches of any shape.

    One code serves all layers alike, so a deep model takes no longer to build than a shallow one.
    Afterwards the model is as before, and the names of its tensors never change: an answer of
    growing length would be compiled again and again. The head is compiled separately, see
    losses/fused_head.py.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = causal._no_split_modules or []
    layers = [module for module in causal.modules() if type(module).__name__ in kinds]
    with ExitStack() as stack:
        for layer in layers or [causal.base_model]:
            compiled = torch.compile(layer.forward, dynamic=True)
            stack.enter_context(replaced_forward(layer, compiled))
        yield
