"""What writing a model as GGUF needs, known before it is trained: packages, and what llama.cpp has.

Imports the package gguf only where it is there.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from yrunner.errors import MissingError, ModelError
from yrunner.models.gguf.quantize import BLOCK, K_QUANTS

ROUTER = ".mlp.gate.weight"
STORED_INSTEAD = {"q6_k": "q8_0", "q5_k_m": "q5_1 or q8_0", "q4_k_m": "q5_0 or q8_0"}
"""What llama.cpp takes for a matrix whose rows K-quants cannot hold."""


def check_gguf(kind: str, stage: str, config: Any, tokenizer: Any) -> None:
    """Raise `YRunnerError` if a model cannot be written as GGUF in this type."""
    if stage == "reward":
        raise ModelError(
            "merge.gguf: a reward model scores answers, and GGUF files write them",
            remedy="remove merge.gguf; transformers loads the merged folder",
        )
    if find_spec("gguf") is None:
        raise MissingError(
            "merge.gguf needs the package gguf", remedy="run pip install 'yrunner[gguf]'"
        )
    from yrunner.models.gguf.architectures import check_supported
    from yrunner.models.gguf.tokenizer import check_tokenizer

    check_supported(config)
    check_tokenizer(tokenizer)
    if kind in K_QUANTS and find_spec("llama_cpp") is None:
        raise MissingError(
            f"merge.gguf: {kind} is written by llama.cpp itself, through llama-cpp-python",
            remedy="run pip install 'yrunner[llamacpp]', which compiles it for some minutes, or "
            "choose q8_0, q5_1 or q4_1",
        )


def fallback_in_words(kind: str, weights: Mapping[str, Tensor]) -> str:
    """A sentence on the matrices that a K-quant cannot hold; empty if there are none.

    `weights`: those of the model by name, tied ones once; only their shapes are looked at.
    """
    if kind not in K_QUANTS:
        return ""
    widths = [
        weight.shape[-1]
        for name, weight in weights.items()
        if weight.dim() > 1 and not name.endswith(ROUTER)
    ]
    unfit = [width for width in widths if width % BLOCK]
    if not unfit:
        return ""
    named = " or ".join(f"{width:,}" for width in sorted(set(unfit)))
    return (
        f"merge.gguf: K-quants need rows of a multiple of {BLOCK} numbers, and {len(unfit):,} of "
        f"{len(widths):,} matrices of this model have rows of {named}. llama.cpp stores those as "
        f"{STORED_INSTEAD[kind]}, so the file is larger than others of {kind}"
    )
