"""Write base and adapters as one model, weight by weight; peft merges one module at a time.

Neither the base nor a file of the result is ever fully in memory, only the adapters and the largest
module in float32, with its change.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from yrunner.errors import ModelError
from yrunner.losses.vocabulary_layers import base_head
from yrunner.models.adapters import untie_config
from yrunner.models.errors import INDEX_FILE, silence_libraries
from yrunner.models.merge.plan import Merge
from yrunner.models.merge.safetensors_io import write_weights


@dataclass(frozen=True)
class MergedWeight:
    """A weight of the result that differs from the base."""

    shape: torch.Size
    make: Callable[[], Tensor]
    """Compute it."""


def write_merged(
    merge: Merge,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    shard_size: str,
    advance: Callable[[int], None],
) -> None:
    """Write weights, in files of `shard_size`, and config; call `advance(1)` for every weight.

    `dtype`: None keeps that of each weight. Raises `ModelError` if a merged weight is not finite.
    """
    changes = changed_weights(merge)
    sizes = merged_sizes(merge, changes, dtype)
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_size)

    def make(name: str) -> Tensor:
        own = sizes[name].dtype
        weight = changes[name].make().to(own) if name in changes else merge.read(name, own)
        advance(1)
        return _finite(name, weight)

    for file, names in plan.filename_to_tensors.items():
        write_weights(folder / file, {name: sizes[name] for name in names}, make)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    for code in merge.base.folder.glob("*.py"):
        (folder / code.name).write_bytes(code.read_bytes())
    _write_config(merge, folder, tied=merge.head not in sizes, dtype=dtype)


def changed_weights(merge: Merge) -> dict[str, MergedWeight]:
    """The weights that the adapters change, by name.

    Includes a tied head if the adapters untie it.
    """
    changes: dict[str, MergedWeight] = {}
    for module in merge.streamed.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            changes |= _saved_module(merge, module)
        elif isinstance(module, BaseTunerLayer):
            changes |= _merged_module(merge, module)
    if merge.tied and {merge.embeddings, merge.head} & changes.keys():
        changes = _with_head(merge, changes)
    replaced = {
        name: MergedWeight(weight.shape, partial(torch.clone, weight))
        for name, weight in merge.replaced.items()
    }
    return replaced | changes


def merged_sizes(
    merge: Merge, changes: Mapping[str, MergedWeight], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Shape and dtype of every weight of the result, as meta tensors.

    Raises `ModelError` if an adapter changes a weight that the base does not have.
    """
    sizes = {
        name: size
        for name, size in merge.base.sizes.items()
        if not (merge.tied and name == merge.head)
    }
    for name, change in changes.items():
        like = sizes.get(merge.embeddings if name == merge.head else name)
        if like is None:
            raise ModelError(
                f"the files of {merge.base.folder} have no weight {name}, which the adapter "
                "changes",
                remedy="load the base with transformers and save it again",
            )
        sizes[name] = like.new_empty(change.shape)
    if dtype is None:
        return sizes
    return {
        name: size.to(dtype) if size.is_floating_point() else size for name, size in sizes.items()
    }


def _with_head(merge: Merge, changes: dict[str, MergedWeight]) -> dict[str, MergedWeight]:
    """The changes to a tied base if embeddings or head change.

    They stay tied only if both become equal, as with tokens trained in both.
    """
    embeddings, head = changes.get(merge.embeddings), changes.get(merge.head)
    if embeddings is not None and head is not None:
        if embeddings.make().equal(head.make()):
            return {name: change for name, change in changes.items() if name != merge.head}
        return changes
    if head is not None:
        return changes
    shared = base_head(merge.streamed.model).weight
    return changes | {merge.head: MergedWeight(shared.shape, partial(_base_weight, merge))}


def _base_weight(merge: Merge) -> Tensor:
    """The tied weight of the base."""
    replaced = merge.replaced.get(merge.embeddings)
    return merge.read(merge.embeddings) if replaced is None else replaced.clone()


def _saved_module(merge: Merge, wrapper: ModulesToSaveWrapper) -> dict[str, MergedWeight]:
    """The weights of a module in `modules_to_save`."""
    name = merge.streamed.modules[id(wrapper.original_module)]
    chosen = wrapper.modules_to_save[wrapper.active_adapters[0]]
    return {
        f"{name}.{inner}": MergedWeight(weight.shape, partial(torch.clone, weight.data))
        for inner, weight in chosen.named_parameters()
    }


def _merged_module(merge: Merge, module: Any) -> dict[str, MergedWeight]:
    """The weights of a module with LoRA matrices."""
    base_layer = module.get_base_layer()
    name = merge.streamed.modules[id(base_layer)]
    has_bias = any(getattr(module, "lora_bias", {}).values())
    return {
        f"{name}.{inner}": MergedWeight(
            getattr(base_layer, inner).shape, partial(_merge_one, merge, module, base_layer, inner)
        )
        for inner in (("weight", "bias") if has_bias else ("weight",))
    }


def _merge_one(merge: Merge, module: Any, base_layer: nn.Module, inner: str) -> Tensor:
    with merge.streamed.filled(base_layer, merge.read), silence_libraries():
        # Not `safe_merge`: it copies each weight, and `_finite` checks the result anyway.
        module.merge(safe_merge=False)
        merged: Tensor = getattr(base_layer, inner).data
        module.merged_adapters.clear()  # `filled` restores the base
    return merged


def _finite(name: str, weight: Tensor) -> Tensor:
    # Extremes show NaN too; `isfinite` of every number would take twice the weight's memory.
    if weight.is_floating_point() and not torch.stack(weight.aminmax()).isfinite().all():
        wide = weight.dtype == torch.float16
        raise ModelError(
            f"{name} is not finite in the merged model",
            remedy="choose bfloat16 or float32 in merge.dtype"
            if wide
            else "check the base, and train the adapter again with a lower learning rate",
        )
    return weight


def _write_config(merge: Merge, folder: Path, *, tied: bool, dtype: torch.dtype | None) -> None:
    config = copy.deepcopy(merge.config)
    config.dtype = dtype or merge.base.main_dtype()
    if merge.tied and not tied:
        untie_config(config)
    with silence_libraries():
        config.save_pretrained(folder)
