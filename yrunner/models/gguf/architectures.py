"""How llama.cpp's architectures differ from those of transformers: names, order of rows, limits.

Sources: conversion/ and src/models/ of llama.cpp, and the tensor names of its package gguf.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from yrunner.errors import ModelError
from yrunner.models.gguf.tokenizer import REMEDY


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp that can be written and read."""

    arch: gguf.MODEL_ARCH
    pairs_neighbours: bool = False
    """Whether rope pairs neighbouring rows of queries and keys. transformers pairs the first half
    of a head with the second."""
    norm_offset: float = 0.0
    """What llama.cpp expects to be added to the weights of norms."""
    activation: str = "silu"
    rotates_a_part: bool = False
    """Whether rope may turn only the first part of a head."""
    in_transformers: bool = True
    """Whether transformers reads GGUF files of it: a proof by another reader than ours."""

    @property
    def name(self) -> str:
        """llama.cpp's name, such as `qwen3moe`."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "llama": Architecture(ARCH.LLAMA, pairs_neighbours=True),
    "mistral": Architecture(ARCH.LLAMA, pairs_neighbours=True),
    "qwen2": Architecture(ARCH.QWEN2),
    "qwen3": Architecture(ARCH.QWEN3),
    "qwen3_moe": Architecture(ARCH.QWEN3MOE),
    "gemma2": Architecture(ARCH.GEMMA2, norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "gemma3_text": Architecture(ARCH.GEMMA3, norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "phi3": Architecture(ARCH.PHI3, rotates_a_part=True),
    "glm4": Architecture(ARCH.GLM4, rotates_a_part=True, in_transformers=False),
    "smollm3": Architecture(ARCH.SMOLLM3, pairs_neighbours=True, in_transformers=False),
}
"""By model_type; a Mistral is a Llama in llama.cpp, and a Phi-4 is a Phi-3."""
MODEL_TYPES = {
    architecture.name: model_type
    for model_type, architecture in ARCHITECTURES.items()
    if model_type != "mistral"
}
"""The model_type of an architecture that is read."""
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Layers by which llama.cpp recognises a Gemma of 27B, whose attention is scaled differently."""
FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Every how many layers a Gemma attends beyond its window."""
YARN_ONLY = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""The settings of YaRN that llama.cpp has for these architectures, whatever a file says."""
NO_ROPE_EVERY = 4
"""Every how many layers a SmolLM3 has no rope in llama.cpp."""
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
PACKED_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


def check_supported(config: Any) -> None:
    """Raise `ModelError` for a model that llama.cpp would compute differently."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"merge.gguf: a {kind} model cannot be written as GGUF",
            remedy=f"it can for {', '.join(ARCHITECTURES)}; for others keep the folder in Hugging "
            "Face format, or convert it by llama.cpp's convert_hf_to_gguf.py",
        )
    rope_type = rope_of(config).get("rope_type", "default")
    if rope_type not in _rope_types(kind):
        raise ModelError(
            f"merge.gguf: rope type {rope_type} of a {kind} model cannot be written as GGUF",
            remedy=REMEDY,
        )
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            "merge.gguf: llama.cpp does not support the sliding window of this model",
            remedy="for short texts, set use_sliding_window to false in its config.json",
        )
    for fault in _differences(config):
        raise ModelError(f"merge.gguf: llama.cpp's {kind} {fault}", remedy=REMEDY)


def _rope_types(kind: str) -> tuple[str, ...]:
    match kind:
        case "phi3":
            return ("default", "longrope")
        case "gemma2" | "gemma3_text" | "glm4":
            return ("default", "linear")
        case "llama" | "mistral":
            return ("default", "linear", "llama3", "yarn")
        case _:
            return ("default", "linear", "yarn")


def _differences(config: Any) -> Iterator[str]:
    """Sentences on what llama.cpp computes differently, whatever the weights are."""
    kind = config.model_type
    expected = ARCHITECTURES[kind].activation
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != expected:
        yield f"has the activation {expected}, not {activation}"
    yield from _differences_of_yarn(rope_of(config))
    if kind in FULL_EVERY:
        yield from _differences_of_gemma(config)
    if kind == "smollm3":
        used = [int((layer + 1) % NO_ROPE_EVERY != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != used:
            yield f"leaves rope out of every layer number {NO_ROPE_EVERY}, this model of others"
        if config.attention_bias or config.mlp_bias:
            yield "has no biases"
    if kind == "qwen3_moe":
        if not config.norm_topk_prob:
            yield "normalises the weights of the chosen experts (norm_topk_prob)"
        if config.decoder_sparse_step != 1 or config.mlp_only_layers:
            yield "has experts in every layer"
        if config.attention_bias:
            yield "has no biases"


def _differences_of_yarn(rope: Mapping[str, Any]) -> Iterator[str]:
    """Settings of YaRN that llama.cpp reads from the files of other architectures only."""
    if rope.get("rope_type") != "yarn":
        return
    for key, value in YARN_ONLY.items():
        found = rope.get(key)
        if found is not None and found != value:
            yield f"has YaRN with {key} {value} only, not {found}"


def _differences_of_gemma(config: Any) -> Iterator[str]:
    kind = config.model_type
    if config.query_pre_attn_scalar != attention_scale_of(config):
        yield (
            f"scales attention by {attention_scale_of(config)}, not by query_pre_attn_scalar "
            f"{config.query_pre_attn_scalar}"
        )
    every = FULL_EVERY[kind]
    expected = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        yield f"attends beyond its window in every layer number {every}, this model in others"
    if config.use_bidirectional_attention:
        yield "attends to earlier tokens only"
    if (config.attn_logit_softcapping is None) == (kind == "gemma2"):
        yield "caps attention" if kind == "gemma2" else "does not cap attention"
    if config.attention_bias:
        yield "has no biases"
    if kind == "gemma3_text":
        local = config.rope_parameters["sliding_attention"].get("rope_type", "default")
        if local != "default":
            yield f"has no rope of the type {local} within its window"


def attention_scale_of(config: Any) -> int:
    """The number whose root divides the attention scores of a Gemma in llama.cpp."""
    if config.num_hidden_layers == GEMMA_27B[config.model_type]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of rope; those of the layers without a window if there are two kinds."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def head_size_of(config: Any) -> int:
    """The size of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rotated_of(config: Any) -> int:
    """How many numbers of a head rope turns."""
    return int(head_size_of(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def longrope_factor(rope: Mapping[str, Any], longest: int) -> float:
    """What longrope multiplies its cosines and sines by; transformers' modeling_rope_utils."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = rope.get("factor") or longest / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


@dataclass(frozen=True)
class Place:
    """Where a GGUF file has a weight of transformers."""

    target: str
    expert: int | None = None
    """The number of the expert, if the file has those of a layer in one tensor."""


class Places:
    """The places of all weights of a model, by their names in transformers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.architecture = ARCHITECTURES[config.model_type]
        self._names = gguf.get_tensor_name_map(self.architecture.arch, config.num_hidden_layers)

    def find(self, name: str) -> Place | None:
        """The place of a weight; None if llama.cpp has no such weight."""
        match = EXPERT.fullmatch(name)
        known = f"{match[1]}.{match[3]}_proj.weight" if match else name
        target = self._names.get_name(known, try_suffixes=(".weight", ".bias"))
        if target is None:
            return None
        return Place(str(target), int(match[2]) if match else None)

    def to_gguf(self, name: str, weight: Tensor) -> Tensor:
        """A weight of transformers as llama.cpp has it."""
        if self._is_norm(name):
            return weight + self.architecture.norm_offset
        heads = self._heads(name)
        if heads is None:
            return weight
        # From the halves of a head to pairs of neighbours.
        parts = weight.reshape(heads, 2, -1, *weight.shape[1:])
        return parts.swapaxes(1, 2).reshape(weight.shape)

    def from_gguf(self, name: str, weight: Tensor) -> Tensor:
        """The inverse of `to_gguf`."""
        if self._is_norm(name):
            return weight - self.architecture.norm_offset
        heads = self._heads(name)
        if heads is None:
            return weight
        parts = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return parts.swapaxes(1, 2).reshape(weight.shape)

    def _is_norm(self, name: str) -> bool:
        return bool(self.architecture.norm_offset) and name.endswith("norm.weight")

    def _heads(self, name: str) -> int | None:
        """How many heads the rows of a weight belong to, if their order differs."""
        if not self.architecture.pairs_neighbours:
            return None
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        return heads.get(name.split(".")[-2])


def unpacked_experts(sizes: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Names and shapes of weights with every expert apart, as published folders have them.

    `sizes` may have those of a layer in one tensor, as transformers has them in memory.
    """
    found: dict[str, torch.Size] = {}
    for name, size in sizes.items():
        match = PACKED_EXPERTS.fullmatch(name)
        if match is None:
            found[name] = size.shape
            continue
        experts, rows, width = size.shape
        parts = ("down",) if match[2] == "down" else ("gate", "up")
        for number in range(experts):
            for part in parts:
                shape = torch.Size((rows // len(parts), width))
                found[f"{match[1]}.{number}.{part}_proj.weight"] = shape
    return found


def yarn_stretch(rope: Mapping[str, Any], longest: int) -> float:
    """How many times longer texts YaRN allows than those that the model saw first."""
    return float(rope.get("factor") or longest / rope["original_max_position_embeddings"])


def yarn_scale(stretch: float, slope: float = 1.0) -> float:
    """What YaRN multiplies its cosines and sines by if the model does not say otherwise."""
    return 1 + 0.1 * slope * math.log(stretch) if stretch > 1 else 1.0


def yarn_scale_of(rope: Mapping[str, Any], stretch: float) -> float:
    """What this model multiplies its cosines and sines by; transformers' modeling_rope_utils."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    slope, slope_below = rope.get("mscale"), rope.get("mscale_all_dim")
    if slope and slope_below:
        return yarn_scale(stretch, slope) / yarn_scale(stretch, slope_below)
    return yarn_scale(stretch)


def rope_factors(config: Any) -> dict[str, Tensor]:
    """The tensors of a file that change rope's frequencies, by name."""
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(config)}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
            for kind in ("long", "short")
        }
    return {}


def llama3_factors(config: Any) -> Tensor:
    """Divisors of Llama 3's rope frequencies, which stretch long waves only.

    The formula of transformers' modeling_rope_utils.
    """
    rope, size = config.rope_parameters, head_size_of(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    waves = 2 * torch.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)
