"""Settings that all tools share: batches, schedule, optimizer, precision, checkpoints, machines."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.commands.convert.conversion import (
    Conversion,
    choices,
    decimal,
    is_number,
    number,
    words,
)
from yrunner.errors import YRunnerError
from yrunner.text_files import read_json


@dataclass(frozen=True)
class Names:
    """What a tool calls its arguments."""

    base: str = "model_name_or_path"
    epochs: str = "num_train_epochs"
    batch: str = "per_device_train_batch_size"
    eval_batch: str = "per_device_eval_batch_size"
    optimizer: str = "optim"
    scheduler: str = "lr_scheduler_type"
    attention: str = "attn_implementation"
    rank: str = "lora_rank"


@dataclass(frozen=True)
class Defaults:
    """What a tool does where its settings say nothing."""

    epochs: int = 3
    batch: int = 8
    learning_rate: float = 5e-5
    scheduler: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False


OPTIMIZERS = {
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_8bit",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_anyprecision": "adamw_torch",
}
SAME_OPTIMIZER = ("adamw_hf", "adamw_bnb_8bit", "paged_adamw", "lion", "adamw_apex_fused")
"""Other names for the same algorithm."""
ATTENTION = {
    "fa2": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
    "disabled": "eager",
    "auto": "auto",
}
DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "auto": "auto",
}
BETAS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""As here."""
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")


def convert_common(c: Conversion, names: Names, defaults: Defaults) -> None:
    """Convert what all tools have; call it before the tool's own data and stage."""
    _length_of_training(c, names, defaults)
    _rate(c, names, defaults)
    _optimizer(c, names, defaults)
    _precision(c)
    _attention(c, names)
    _memory(c, defaults)
    _checkpoints(c)
    _reports(c)
    _run(c)
    _machines(c)
    _tweaks(c)


def _length_of_training(c: Conversion, names: Names, defaults: Defaults) -> None:
    max_steps = number(c.get("max_steps", -1))
    if is_number(max_steps) and max_steps > 0:
        c.carry("max_steps", "train.max_steps", int(max_steps))
        c.ignored(names.epochs, "max_steps counts instead")
    else:
        c.same("max_steps", "off, as here")
        epochs = decimal(c.get(names.epochs, defaults.epochs))
        whole = max(1, math.ceil(epochs)) if is_number(epochs) else epochs
        how = "" if whole == epochs else f"{epochs:g} there; whole epochs only, see max_steps"
        if not c.carry(names.epochs, "train.epochs", whole, how):
            c.fill("train.epochs", whole, f"default of {c.tool}")
    for key, place, value in (
        (names.batch, "train.batch_size", defaults.batch),
        ("gradient_accumulation_steps", "train.gradient_accumulation_steps", 1),
    ):
        if isinstance(number(c.get(key, value)), int) and number(c.get(key, value)) >= 1:
            if not c.carry(key, place, number(c.get(key, value))) and value != 1:
                c.fill(place, value, f"default of {c.tool}")
        else:
            c.carry(key, place, value, f"{c.get(key)} there")
    if isinstance(number(c.get(names.eval_batch)), int):
        c.changed(names.eval_batch, "validation uses train.batch_size")


def _rate(c: Conversion, names: Names, defaults: Defaults) -> None:
    rate = number(c.get("learning_rate", defaults.learning_rate))
    if not c.carry("learning_rate", "train.learning_rate", decimal(rate)):
        c.fill("train.learning_rate", defaults.learning_rate, f"default of {c.tool}")
    schedule = str(c.get(names.scheduler, defaults.scheduler)).lower()
    known = choices("train", "lr_scheduler")
    how = "" if schedule in known else f"{schedule} there"
    if not c.carry(names.scheduler, "train.lr_scheduler", schedule if not how else "cosine", how):
        c.fill("train.lr_scheduler", schedule, f"default of {c.tool}")
    _warmup(c, defaults)


def _warmup(c: Conversion, defaults: Defaults) -> None:
    steps = number(c.get("warmup_steps", 0))
    total = c.values.get("train.max_steps")
    if not is_number(steps):
        steps = 0
    if not steps:
        c.same("warmup_steps", "off, as here")
    elif steps < 1:
        c.carry("warmup_steps", "train.warmup_ratio", float(steps))
    elif total:
        share = min(round(steps / total, 6), 0.99)
        c.carry("warmup_steps", "train.warmup_ratio", share, f"{steps} of {total} updates there")
    else:
        how = f"{steps} updates there; divide by the updates that yrun check prints"
        c.carry("warmup_steps", "train.warmup_ratio", 0.03, how)
    if steps:
        c.ignored("warmup_ratio", "warmup_steps counts instead")
    elif not c.carry("warmup_ratio", "train.warmup_ratio", decimal(c.get("warmup_ratio", 0))):
        c.fill("train.warmup_ratio", defaults.warmup_ratio, f"default of {c.tool}")


def _optimizer(c: Conversion, names: Names, defaults: Defaults) -> None:
    given = str(c.get(names.optimizer, "adamw_torch")).lower()
    wanted = OPTIMIZERS.get(given, given)
    how = "" if wanted == given or given in SAME_OPTIMIZER else f"{given} there"
    if wanted not in choices("train", "optimizer"):
        wanted, how = "adamw_torch", f"{given} has no counterpart"
    c.carry(names.optimizer, "train.optimizer", wanted, how)
    for key, place in (
        ("weight_decay", "train.weight_decay"),
        ("max_grad_norm", "train.max_grad_norm"),
    ):
        if isinstance(number(c.get(key)), int | float):
            c.carry(key, place, decimal(c.get(key)))
    if defaults.weight_decay:
        c.fill("train.weight_decay", defaults.weight_decay, f"default of {c.tool}")
    for key, value in BETAS.items():
        if number(c.get(key)) == value:
            c.same(key, "the same here")


def _precision(c: Conversion) -> None:
    for key in ("torch_dtype", "dtype", "data_type"):
        word = str(c.get(key, "")).removeprefix("torch.")
        if word in DTYPES:
            c.carry(key, "model.dtype", DTYPES[word])
    for keys, dtype in (
        (("fp16", "float16"), "float16"),
        (("bf16", "bfloat16", "pure_bf16"), "bfloat16"),
    ):
        for key in keys:
            value = number(c.get(key))
            if value == "auto":
                c.carry(key, "model.dtype", "auto")
            elif value in (True, "full"):
                pure = "trained weights are always float32" if key == "pure_bf16" else ""
                c.carry(key, "model.dtype", dtype, pure)


def _attention(c: Conversion, names: Names) -> None:
    for key in (names.attention, "flash_attention", "sdp_attention", "eager_attention"):
        value = c.get(key)
        word = key if value is True else str(value)
        word = {"flash_attention": "fa2", "sdp_attention": "sdpa", "eager_attention": "eager"}.get(
            word, word
        )
        if value is None or value is False:
            continue
        how = "" if word in ATTENTION else f"{value} there"
        c.carry(key, "model.attention", ATTENTION.get(word, "auto"), how)


def _memory(c: Conversion, defaults: Defaults) -> None:
    value = number(c.get("gradient_checkpointing", defaults.gradient_checkpointing))
    how = "" if isinstance(value, bool) else f"{value} there: activations are recomputed"
    if not c.carry("gradient_checkpointing", "train.gradient_checkpointing", bool(value), how):
        if defaults.gradient_checkpointing:
            c.fill("train.gradient_checkpointing", True, f"default of {c.tool}")
    if c.values.get("train.gradient_checkpointing"):
        for key in ("gradient_checkpointing_kwargs", "use_reentrant_gc", "activation_offloading"):
            c.without(key, "recomputed without reentrance here")
    else:
        for key in ("gradient_checkpointing_kwargs", "use_reentrant_gc"):
            c.ignored(key, "gradient checkpointing is off")
    if number(c.get("torch_compile")) is True:
        c.carry("torch_compile", "train.torch_compile", True)
        for key in ("torch_compile_mode", "torch_compile_backend"):
            c.without(key, "chosen for the machine")
    if number(c.get("trust_remote_code")) is True:
        c.carry("trust_remote_code", "model.trust_remote_code", True)


def _checkpoints(c: Conversion) -> None:
    strategy = _strategy(c.get("save_strategy", "steps"))
    if strategy == "steps":
        c.same("save_strategy", "save_steps says when")
        _every(c, "save_steps", "train.checkpoint.every")
    else:
        c.ignored("save_steps", f"save_strategy is {strategy}")
        how = "" if strategy == "epoch" else f"save_strategy {strategy} there"
        c.carry("save_strategy", "train.checkpoint.every", "epoch", how)
    if isinstance(number(c.get("save_total_limit")), int) and number(c.get("save_total_limit")) > 0:
        c.carry("save_total_limit", "train.checkpoint.keep", number(c.get("save_total_limit")))
    _validations(c)
    for key in ("early_stopping_patience", "early_stop_interval", "early_stopping_steps"):
        patience = number(c.get(key))
        if isinstance(patience, int) and patience > 0:
            c.carry(key, "train.early_stopping.patience", patience)
    best = number(c.get("load_best_model_at_end"))
    if best is not None:
        c.carry("load_best_model_at_end", "train.result", "best" if best else "last")
    for key, usual in (
        ("metric_for_best_model", ("loss", "eval_loss")),
        ("greater_is_better", OFF),
    ):
        if c.get(key) in usual:
            c.same(key, "the same here")


OFF = (None, False, "False", "false")


def _strategy(value: Any) -> str:
    """A strategy of transformers; YAML reads `no` as false."""
    return "no" if value is False else str(value)


def _every(c: Conversion, key: str, place: str) -> None:
    steps = number(c.get(key))
    if isinstance(steps, float) and 0 < steps < 1:
        c.carry(key, place, "epoch", f"{steps:g} of the training there")
    elif isinstance(steps, int) and steps > 0:
        c.carry(key, place, steps)


def _validations(c: Conversion) -> None:
    """When to validate, if apart from the checkpoints."""
    usual = "no" if c.tool in ("LLaMA-Factory", "TRL") else "steps"
    strategy = _strategy(c.get("eval_strategy", c.get("evaluation_strategy", usual)))
    for key in ("eval_strategy", "evaluation_strategy"):
        if strategy == "epoch":
            c.carry(key, "train.validate_every", "epoch")
        elif strategy == "steps":
            c.same(key, "eval_steps says when")
        else:
            c.same(key, "validates only where there are validation rows, as here")
    if strategy == "steps":
        _every(c, "eval_steps", "train.validate_every")
    elif c.get("eval_steps") is not None:
        c.ignored("eval_steps", f"eval_strategy is {strategy}")
    for key in ("eval_on_start", "eval_delay", "eval_accumulation_steps", "prediction_loss_only"):
        c.without(key, "not needed: validates with the checkpoints")


def _reports(c: Conversion) -> None:
    steps = number(c.get("logging_steps"))
    if isinstance(steps, int | float) and steps >= 1:
        c.carry("logging_steps", "train.log_every", int(steps))
    elif steps is not None:
        c.changed("logging_steps", f"{steps} of the training there; see train.log_every")
    named = [word.lower() for word in words(c.get("report_to", []))]
    found = [word for word in named if word in TRACKERS]
    if found:
        left_out = [word for word in named if word not in TRACKERS]
        c.carry("report_to", "train.trackers", found, f"without {left_out}" if left_out else "")
    elif set(named) <= {"none", "all"}:
        c.same("report_to", "none, as here")
    for tracker in TRACKERS:
        if number(c.get(f"use_{tracker}")) is True or c.get(f"{tracker}_project"):
            key = f"use_{tracker}" if c.get(f"use_{tracker}") else f"{tracker}_project"
            c.carry(key, "train.trackers", [*c.values.get("train.trackers", ()), tracker])


def _run(c: Conversion) -> None:
    """Seed, run folder, uploads and resuming."""
    if isinstance(number(c.get("seed")), int):
        c.carry("seed", "seed", number(c.get("seed")))
    if c.get("data_seed") is not None:
        c.changed("data_seed", "the seed is also that of the data")
    if c.get("output_dir"):
        c.carry("output_dir", "output", str(c.get("output_dir")))
    pushed = c.get("hub_model_id", c.get("export_hub_model_id"))
    for key in ("hub_model_id", "export_hub_model_id"):
        if c.get(key) and "/" in str(pushed):
            c.carry(key, "merge.push", str(pushed), "by yrun merge, not while it trains")
    if number(c.get("push_to_hub")) is True:
        c.changed("push_to_hub", "yrun merge uploads to merge.push")
    for key in ("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"):
        if c.get(key) is not None:
            c.without(key, "see merge.push and merge.private")
    if c.get("resume_from_checkpoint"):
        c.changed("resume_from_checkpoint", "the option --resume of yrun train")


def _machines(c: Conversion) -> None:
    config = c.get("deepspeed", c.get("deepspeed_config", c.get("deepspeed_cfg_path")))
    for key in ("deepspeed", "deepspeed_config", "deepspeed_cfg_path"):
        if c.get(key) is not None:
            _deepspeed(c, key, config)


def _deepspeed(c: Conversion, key: str, config: Any) -> None:
    found = c.find(config) if isinstance(config, str) else None
    if found is not None and found.is_file():
        values = _json_or_nothing(found)
    else:
        values = config if isinstance(config, dict) else {}
    zero = values.get("zero_optimization", {})
    name = Path(str(config)).stem.lower()
    match = re.search(r"z(?:ero)?[-_]?(?:stage[-_]?)?([0-3])", name)
    stage = zero.get("stage", int(match.group(1)) if match else None)
    offload = "offload" in name or bool({"offload_optimizer", "offload_param"} & {
        part for part, section in zero.items()
        if isinstance(section, dict) and section.get("device", "none") != "none"
    })  # fmt: skip
    if stage in (1, 2, 3):
        c.carry(key, "distributed.deepspeed.stage", stage, "its other values are chosen here")
        if offload:
            c.put("distributed.deepspeed.offload", "cpu", f"as {name}")
    elif stage == 0:
        c.changed(key, "ZeRO 0 shards nothing, so every process holds everything")
    else:
        c.without(key, "set distributed.deepspeed.stage")


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except YRunnerError:
        return {}
    return values if isinstance(values, dict) else {}


def _tweaks(c: Conversion) -> None:
    """What is trained beside LoRA."""
    for key in ("loraplus_lr_ratio", "lorap_lr_ratio"):
        value = number(c.get(key))
        if isinstance(value, int | float) and value > 0:
            c.carry(key, "tuning.lora_plus_ratio", float(value))
    for key in ("modules_to_save", "lora_modules_to_save", "additional_target"):
        if c.get(key):
            c.carry(key, "tuning.modules_to_save", words(c.get(key)))


def convert_lora(c: Conversion, *, rank: str, dropout: float) -> None:
    """Rank, alpha, dropout and variant of an adapter; `rank` is the key of the rank."""
    for key, place, kind in (
        (rank, "tuning.rank", int),
        ("lora_alpha", "tuning.alpha", float),
        ("lora_dropout", "tuning.dropout", float),
    ):
        value = number(c.get(key))
        if isinstance(value, int | float):
            c.carry(
                key, place, int(value) if kind is int or (value == int(value) and value) else value
            )
    c.fill("tuning.dropout", dropout, f"default of {c.tool}")
    variants = [
        (key, variant)
        for variant in ("dora", "rslora")
        for key in (f"use_{variant}", f"peft_use_{variant}")
        if number(c.get(key)) is True
    ]
    for index, (key, variant) in enumerate(variants):
        if index == 0:
            c.carry(key, "tuning.variant", variant)
        else:
            c.without(key, "one variant at a time; see tuning.variant")


def ignore_lora(c: Conversion, why: str) -> None:
    """The old tool trains no adapter, so its keys had no effect."""
    for key in list(c.left):
        if key.startswith(("lora_", "peft_use_", "loraplus_")) or key in ("use_dora", "use_rslora"):
            if c.left[key] not in (None, False, "", []):
                c.ignored(key, why)


def targets(c: Conversion, key: str, linear: tuple[str, ...] = ("all", "all-linear")) -> None:
    """The modules that get an adapter: a list of names, or all linear layers."""
    value = c.get(key)
    if value is None:
        return
    found = words(value)
    if any(word in linear for word in found):
        c.carry(key, "tuning.targets", "all-linear")
    elif isinstance(value, str) and set(value) & set("()\\|[]*^$+"):
        named = _names_of(value)
        how = f"the names in {value}, in every layer" if named else f"{value} there"
        c.carry(key, "tuning.targets", named or "all-linear", how)
    else:
        c.carry(key, "tuning.targets", [word.rsplit(".", 1)[-1] for word in found],
                "module names alone" if any("." in word for word in found) else "")  # fmt: skip


def _names_of(pattern: str) -> list[str]:
    """The module names at the end of a regular expression such as `.*(q|k|v)_proj`."""
    names = []
    for inner, tail in re.findall(r"\(([\w|]+)\)(\w*)", pattern):
        if tail or "proj" in inner:
            names += [f"{word}{tail}" for word in inner.split("|")]
    return list(dict.fromkeys(names))
