"""DeepSpeed's configuration: made from the recipe, or a file that does not contradict it."""

import json
from collections.abc import Mapping
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

from yrunner.errors import RunError
from yrunner.recipe.schema.distributed import DeepSpeedSection
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.text_files import read_json

AUTO = "auto"
"""What transformers fills in from the recipe, see `make_arguments`."""
SETTINGS_OF_ALL: dict[str, Any] = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    # Explicit: without it DeepSpeed clips at 1.
    "gradient_clipping": AUTO,
    "bf16": {"enabled": AUTO},
    "fp16": {"enabled": AUTO},
    # Its own Adam for the processor is compiled at the first start, which needs a compiler.
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
NUMBERS_AT_ONCE = 10**8
"""What is read from a disk at once, in each of four tensors; DeepSpeed would take 16 GB for it."""
NOT_HERE = {
    "optimizer": "train.optimizer",
    "scheduler": "train.lr_scheduler",
    "data_efficiency": "data",
}
"""Sections of DeepSpeed's that would do what a key of the recipe does already."""


def deepspeed_settings(section: DeepSpeedSection) -> dict[str, Any]:
    """The configuration of a stage; of a file, what is in it."""
    if section.config is not None:
        return read_settings(section.config)
    zero: dict[str, Any] = {"stage": section.stage, "contiguous_gradients": True}
    zero |= {"overlap_comm": True, "reduce_bucket_size": AUTO}
    if section.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": AUTO,
            "stage3_param_persistence_threshold": AUTO,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if section.offload != "none":
        zero["offload_optimizer"] = {"device": section.offload, "pin_memory": True}
        if section.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        if section.nvme_folder is not None:
            zero["offload_optimizer"]["nvme_path"] = str(section.nvme_folder)
            zero["sub_group_size"] = NUMBERS_AT_ONCE
    return {**deepcopy(SETTINGS_OF_ALL), "zero_optimization": zero}


def read_settings(file: Path) -> dict[str, Any]:
    """The configuration in a file. Raises `YRunnerError` unless it is JSON with a ZeRO stage."""
    settings = read_json(file)
    stage = _value(settings, "zero_optimization.stage") if isinstance(settings, dict) else None
    if stage not in (1, 2, 3):
        raise RunError(
            f"{file} is not a DeepSpeed configuration with zero_optimization.stage 1, 2 or 3",
            remedy="start from one of those in deepspeed_configs",
        )
    return dict(settings)


def check_settings(
    file: Path, train: TrainSection, *, dtype: str, micro_steps: int, num_ranks: int
) -> None:
    """Raise `RunError` if the file contradicts the recipe, showing both values.

    `dtype` is the name of the precision to compute in, `micro_steps` those of an update.
    """
    settings = read_settings(file)
    if _value(settings, "zero_optimization.offload_param.device") == "nvme":
        # DeepSpeed's buffers for them hold no weight of more than 10**8 numbers, and it says so
        # in the midst of loading.
        raise RunError(
            f'{file}: offload_param.device is "nvme", but only the optimizer may lie on a disk',
            remedy='write "cpu" there; the optimizer is six times as large as the weights',
        )
    of_recipe = {
        "train_micro_batch_size_per_gpu": ("train.batch_size", train.batch_size),
        "gradient_accumulation_steps": ("train.gradient_accumulation_steps", micro_steps),
        "train_batch_size": (
            "train.batch_size times gradient_accumulation_steps times processes",
            train.batch_size * micro_steps * num_ranks,
        ),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "bf16.enabled": ("model.dtype bfloat16", dtype == "bfloat16"),
        "fp16.enabled": ("model.dtype float16", dtype == "float16"),
        "optimizer.params.lr": ("train.learning_rate", train.learning_rate),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
        "scheduler.params.warmup_max_lr": ("train.learning_rate", train.learning_rate),
    }
    for key, (name, wanted) in of_recipe.items():
        found = _value(settings, key)
        if found not in (None, AUTO, wanted):
            raise RunError(
                f"{file}: {key} is {json.dumps(found)}, but {name} is {json.dumps(wanted)}",
                remedy=f'make them equal, or write "{AUTO}" in the file',
            )
    for section, key in NOT_HERE.items():
        if section in settings:
            raise RunError(
                f"{file} has a section {section}, which {key} of the recipe decides",
                remedy="remove it from the file",
            )


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what they leave open, so that the recipe decides it and not DeepSpeed."""
    whole = {**deepcopy(SETTINGS_OF_ALL), **deepcopy(dict(settings))}
    if whole["zero_optimization"]["stage"] == 3:
        whole["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return whole


def apart(settings: Mapping[str, Any], run_folder: Path) -> dict[str, Any]:
    """The settings with a folder on the disk for this run alone.

    DeepSpeed calls its files there by the number of a process: two runs would share them.
    """
    whole = deepcopy(dict(settings))
    folder = disk_folder(settings, run_folder)
    if folder is not None:
        whole["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
    return whole


def disk_folder(settings: Mapping[str, Any], run_folder: Path) -> Path | None:
    """That folder; None where nothing goes to a disk."""
    path = _value(settings, "zero_optimization.offload_optimizer.nvme_path")
    if not path:
        return None
    mark = sha256(str(run_folder.resolve()).encode()).hexdigest()[:8]
    return Path(path) / f"{run_folder.name}-{mark}"


def _value(settings: Mapping[str, Any], dotted: str) -> Any:
    found: Any = settings
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
