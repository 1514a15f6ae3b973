"""The recipe's `merge`: how an adapter is merged, exported and uploaded."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from yrunner.recipe.schema.section import HubId, ModelSource, Section


def _has_owner(hub_id: str) -> str:
    if "/" not in hub_id:
        raise ValueError(f'"{hub_id}" has no owner; write "owner/name"')
    return hub_id


class AddedAdapter(Section):
    """Another adapter to merge."""

    adapter: ModelSource
    """A folder or a Hub id of an adapter for the same base."""
    weight: float = 1.0
    """Factor for the adapter's change to the base; negative values subtract it."""


class FourBitBase(Section):
    """How the base was quantized to 4 bits while the adapter was trained."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of the quantized weights."""
    double_quant: bool = True
    """Whether the block scales were quantized too."""


class MergeSection(Section):
    """How an adapter is merged into its base, or a full model is rewritten, and exported."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the merged weights. `auto`: that of each weight in the base."""
    shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(\.\d+)?(KB|MB|GB)$")
    """Maximum size of a weight file, such as 200MB."""
    verify: bool = True
    """Verify on texts that the merged model predicts the same as base and adapter."""
    weight: float = 1.0
    """Factor for the change made by the run's own adapter."""
    adapters: list[AddedAdapter] = Field([])
    """Further adapters to merge."""
    as_trained: FourBitBase | None = None
    """Merge into the dequantized 4-bit base instead of the original one: for an adapter that was
    trained on a 4-bit base."""
    gguf: (
        Literal[
            "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"
        ]
        | None
    ) = None
    """Also write the model as GGUF in this precision, for llama.cpp and Ollama. llama.cpp itself
    quantizes to q6_k, q5_k_m and q4_k_m, which needs llama-cpp-python."""
    push: Annotated[HubId, AfterValidator(_has_owner)] | None = None
    """Hub repository to upload the result to, as owner/name."""
    private: bool = True
    """Create a new repository as private."""
