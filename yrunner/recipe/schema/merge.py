"""The recipe's `merge`: what becomes of an adapter after training, and where it goes."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from yrunner.recipe.schema.section import HubId, ModelSource, Section


def _has_owner(hub_id: str) -> str:
    if "/" not in hub_id:
        raise ValueError(f'"{hub_id}" names no owner; write "owner/name"')
    return hub_id


class AddedAdapter(Section):
    """An adapter that is merged in besides the run's own."""

    adapter: ModelSource
    """A folder or a Hub id; it has to belong to the same base."""
    weight: float = 1.0
    """What its change of the base is multiplied by. Below 0, it is taken away."""


class FourBitBase(Section):
    """How a base was stored in 4 bits while the adapter was trained on it."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values that a weight could have."""
    double_quant: bool = True
    """Whether the scales of the blocks were quantized too."""


class MergeSection(Section):
    """How the adapter is merged into its base, or a whole model written anew, and exported."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the merged weights. auto: that of each weight in the base."""
    shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(\.\d+)?(KB|MB|GB)$")
    """Largest file of weights, such as 200MB."""
    verify: bool = True
    """Prove on texts that the merged model answers as base and adapter do."""
    weight: float = 1.0
    """What the change by the run's own adapter is multiplied by."""
    adapters: list[AddedAdapter] = Field([])
    """Adapters that are merged in besides it."""
    as_trained: FourBitBase | None = None
    """Merge onto the base as it was in 4 bits, made exact again, and not onto the exact one: for
    an adapter that was trained on a base in 4 bits."""
    gguf: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = None
    """Write the model in this precision also as GGUF, for llama.cpp and Ollama."""
    push: Annotated[HubId, AfterValidator(_has_owner)] | None = None
    """Repository of the Hub that the result is uploaded to, as owner/name."""
    private: bool = True
    """Whether a new repository is seen by its owner only."""
