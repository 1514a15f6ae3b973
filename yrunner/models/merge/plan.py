"""Bring adapters and their base together without reading the base: what can be merged, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from yrunner.errors import ModelError
from yrunner.models.adapters import (
    CONFIG_FILE,
    attach_adapter,
    base_name,
    fit_vocabulary,
    weight_shapes,
)
from yrunner.models.merge.safetensors_io import SafetensorsFolder
from yrunner.models.merge.streaming import Read, StreamedModel, build_streamed_model
from yrunner.models.meta import read_config
from yrunner.models.quantization import four_bit_names, through_four_bits

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
"""Settings of LoRA whose effect cannot be added to the weights of single modules."""

KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin a LoRA that leave the weights of the base alone."""


@dataclass(frozen=True)
class Weighted:
    """An adapter's folder, and what its change is multiplied by."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class FourBits:
    """How the base was stored while the adapter was trained."""

    quant_type: str
    double_quant: bool


@dataclass(frozen=True)
class Merge:
    """A base with its adapters, ready to run or to be written as one model."""

    base: SafetensorsFolder
    streamed: StreamedModel
    """With the adapters attached."""
    config: Any
    """Of the model without them, in the size that they need."""
    read: Read
    """Reads a weight of the base by its name in the model."""
    brought: Mapping[str, Tensor]
    """The weights of the base that an adapter holds as a whole."""
    embeddings: str
    """The name of the weight of the embeddings."""
    head: str
    """The name of the weight of the output head."""
    tied: bool
    """Whether the two are one in the base."""

    @property
    def can_stream(self) -> bool:
        """Whether every weight of the model stands by its name in the files of the base.

        Those of a mixture of experts do not: transformers packs them while it loads them.
        """
        return set(self.streamed.names.values()) <= self.base.sizes.keys() | self.brought.keys()


def prepare_merge(
    base: SafetensorsFolder,
    adapters: Sequence[Weighted],
    *,
    as_trained: FourBits | None = None,
    trust_remote_code: bool = False,
) -> Merge:
    """Attach the adapters to their base, of which no weight is read.

    Raises `ModelError` for adapters that do not fit the base or cannot be merged, together or at
    all.
    """
    for adapter in adapters:
        _check_mergeable(adapter, alone=len(adapters) == 1)

    def prepare(model: Any) -> None:
        _part_different_head(model, base)
        for adapter in adapters:
            fit_vocabulary(model, adapter.folder)

    plain = build_streamed_model(
        read_config(str(base.folder), trust_remote_code=trust_remote_code),
        prepare=prepare,
        kept=frozenset(name for adapter in adapters for name in _whole_weights(adapter.folder)),
        trust_remote_code=trust_remote_code,
    )
    embeddings, head = plain.model.get_input_embeddings(), plain.model.get_output_embeddings()
    tied = embeddings.weight is head.weight
    read = _reader(base, plain.model, as_trained)
    streamed = StreamedModel(attach_all(plain.model, adapters), plain.names, plain.modules)
    return Merge(
        base,
        streamed,
        plain.model.config,
        read,
        brought={
            plain.names[id(weight)]: weight.data
            for weight in streamed.model.parameters()
            if id(weight) in plain.names and not streamed.absent(weight)
        },
        embeddings=f"{plain.modules[id(embeddings)]}.weight",
        head=f"{plain.modules[id(head)]}.weight",
        tied=tied,
    )


def attach_all(model: Any, adapters: Sequence[Weighted]) -> Any:
    """The model with all adapters at work, each multiplied by its weight."""
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


def _check_mergeable(adapter: Weighted, *, alone: bool) -> None:
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
            f"the adapter {adapter.folder} is of the kind {config.peft_type.value}",
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
            f"the adapter {adapter.folder} began as {config.init_lora_weights}, which changes the "
            "base too",
            remedy="convert it first: peft's save_pretrained has "
            "path_initial_model_for_weight_conversion",
        )
    if alone and adapter.weight == 1:
        return
    whole = [name for name in weight_shapes(adapter.folder) if ".lora_" not in name]
    if config.use_dora or whole:
        what = "is DoRA" if config.use_dora else f"holds whole weights ({base_name(whole[0])})"
        raise ModelError(
            f"the adapter {adapter.folder} {what}, so it is merged alone and with weight 1",
            remedy="leave out merge.weight and merge.adapters",
        )


def _whole_weights(adapter: Path) -> list[str]:
    """Weights of the base that an adapter holds, but for modules of which it has its own."""
    own = PeftConfig.from_pretrained(str(adapter)).modules_to_save or []
    names = map(base_name, weight_shapes(adapter))
    return [name for name in names if ".lora_" not in name and not set(name.split(".")) & set(own)]


def _part_different_head(model: Any, base: SafetensorsFolder) -> None:
    """Part head and embeddings where the config ties them, but the files hold two different ones.

    transformers does the same when it loads such files.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{base.folder} has no output head", remedy="merge a language model")
    names = [
        f"{name}.weight" for name, module in model.named_modules() if module in (embeddings, head)
    ]
    if embeddings.weight is not head.weight or not base.sizes.keys() >= set(names):
        return
    if not base.read(names[0]).equal(base.read(names[1])):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _reader(base: SafetensorsFolder, model: nn.Module, as_trained: FourBits | None) -> Read:
    """What reads the weights of the base, as they are or as they were in 4 bits."""
    if as_trained is None:
        return base.read
    coarse = four_bit_names(model)

    def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in coarse:
            return base.read(name, dtype)
        return through_four_bits(
            base.read(name), as_trained.quant_type, double_quant=as_trained.double_quant
        ).to(dtype)

    return read
