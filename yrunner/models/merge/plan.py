"""Attach adapters to their base without reading its weights; reject what cannot be merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from yrunner.errors import ModelError
from yrunner.losses.vocabulary_layers import is_tied
from yrunner.models.adapters import (
    CONFIG_FILE,
    attach_adapter,
    base_name,
    resize_vocabulary,
    untie,
    weight_shapes,
)
from yrunner.models.merge.safetensors_io import SafetensorsFolder
from yrunner.models.merge.streaming import Read, StreamedModel, build_streamed_model
from yrunner.models.meta import read_config
from yrunner.models.quantization import four_bit_names, quantize_and_restore

NOT_MERGED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""LoRA settings whose effect cannot be added to the weights of single modules."""

KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of LoRA that do not change the base."""


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter's folder and the factor of its change."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class BaseQuantization:
    """How the base was quantized while the adapter was trained."""

    quant_type: str
    double_quant: bool


@dataclass(frozen=True)
class Merge:
    """A base with its adapters, ready to run or to write as one model."""

    base: SafetensorsFolder
    streamed: StreamedModel
    """With the adapters attached."""
    config: Any
    """Of the base, with the vocabulary size that the adapters need."""
    read: Read
    """Reads a weight of the base by its name in the model."""
    replaced: Mapping[str, Tensor]
    """Full weights of the base that an adapter brings."""
    embeddings: str
    """The name of the weight of the embeddings."""
    head: str
    """The name of the weight of the output head."""
    tied: bool
    """Whether the two are tied in the base."""

    @property
    def can_stream(self) -> bool:
        """Whether the files of the base contain every weight of the model by its name.

        Not for a mixture of experts: transformers packs their weights while loading.
        """
        return set(self.streamed.names.values()) <= self.base.sizes.keys() | self.replaced.keys()


def prepare_merge(
    base: SafetensorsFolder,
    adapters: Sequence[WeightedAdapter],
    *,
    as_trained: BaseQuantization | None = None,
    trust_remote_code: bool = False,
) -> Merge:
    """Attach the adapters to their base without reading its weights.

    Raises `ModelError` for adapters that do not fit the base or cannot be merged, or not together.
    """
    for adapter in adapters:
        _check_mergeable(adapter, alone=len(adapters) == 1)

    def prepare(model: Any) -> None:
        _untie_different_head(model, base)
        for adapter in adapters:
            resize_vocabulary(model, adapter.folder)

    plain = build_streamed_model(
        read_config(str(base.folder), trust_remote_code=trust_remote_code),
        prepare=prepare,
        kept=frozenset(name for adapter in adapters for name in _whole_weights(adapter.folder)),
        trust_remote_code=trust_remote_code,
    )
    embeddings, head = plain.model.get_input_embeddings(), plain.model.get_output_embeddings()
    tied = is_tied(plain.model)
    read = _reader(base, plain.model, as_trained)
    streamed = StreamedModel(attach_all(plain.model, adapters), plain.names, plain.modules)
    return Merge(
        base,
        streamed,
        plain.model.config,
        read,
        replaced={
            plain.names[id(weight)]: weight.data
            for weight in streamed.model.parameters()
            if id(weight) in plain.names and not streamed.absent(weight)
        },
        embeddings=f"{plain.modules[id(embeddings)]}.weight",
        head=f"{plain.modules[id(head)]}.weight",
        tied=tied,
    )


def attach_all(model: Any, adapters: Sequence[WeightedAdapter]) -> Any:
    """Attach all adapters, each multiplied by its weight, and activate them."""
    if not adapters:
        return model.eval()
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        model = attach_adapter(model, adapter.folder, trainable=False, name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= adapter.weight
    return model.eval()


def _check_mergeable(adapter: WeightedAdapter, *, alone: bool) -> None:
    """Raise `ModelError` for an adapter that cannot be merged, or not with others."""
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{adapter.folder / CONFIG_FILE} is damaged ({str(error).splitlines()[0]})",
            remedy="save or download the adapter again",
        ) from error
    if config.peft_type != PeftType.LORA:
        raise ModelError(
            f"the adapter {adapter.folder} has the type {config.peft_type.value}",
            remedy="use a LoRA adapter",
        )
    odd = [key for key in NOT_MERGED if getattr(config, key, None)]
    if odd:
        raise ModelError(
            f"the adapter {adapter.folder} uses {odd[0]}, which cannot be merged",
            remedy="serve it beside its base",
        )
    if config.init_lora_weights not in KEEPS_THE_BASE:
        raise ModelError(
            f"the adapter {adapter.folder} was initialised by {config.init_lora_weights}, "
            "which changes the base too",
            remedy="convert it first: peft's save_pretrained has "
            "path_initial_model_for_weight_conversion",
        )
    if alone and adapter.weight == 1:
        return
    whole = [name for name in weight_shapes(adapter.folder) if ".lora_" not in name]
    if config.use_dora or whole:
        what = "is DoRA" if config.use_dora else f"holds full weights ({base_name(whole[0])})"
        raise ModelError(
            f"the adapter {adapter.folder} {what}, so it can only be merged alone, with weight 1",
            remedy="remove merge.weight and merge.adapters",
        )


def _whole_weights(adapter: Path) -> list[str]:
    """Full weights of the base in an adapter's file, without its copies of `modules_to_save`."""
    own = PeftConfig.from_pretrained(str(adapter)).modules_to_save or []
    names = map(base_name, weight_shapes(adapter))
    return [name for name in names if ".lora_" not in name and not set(name.split(".")) & set(own)]


def _untie_different_head(model: Any, base: SafetensorsFolder) -> None:
    """Untie head and embeddings if the config ties them, but the files contain two different ones.

    transformers does the same when it loads such files.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{base.folder} has no output head", remedy="merge a language model")
    names = [
        f"{name}.weight" for name, module in model.named_modules() if module in (embeddings, head)
    ]
    if not is_tied(model) or not base.sizes.keys() >= set(names):
        return
    if not base.read(names[0]).equal(base.read(names[1])):
        untie(model, head)


def _reader(base: SafetensorsFolder, model: nn.Module, as_trained: BaseQuantization | None) -> Read:
    """A reader of the base's weights, as stored or as quantized in training."""
    if as_trained is None:
        return base.read
    quantized = four_bit_names(model)

    def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in quantized:
            return base.read(name, dtype)
        return quantize_and_restore(
            base.read(name), as_trained.quant_type, double_quant=as_trained.double_quant
        ).to(dtype)

    return read
