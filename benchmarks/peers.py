"""How a user of TRL, LLaMA-Factory, Axolotl or ms-swift starts the same LoRA training.

Rank 16 on all linear layers, float32, one epoch in batches of 4; everything else is as the tool has
it. Each function writes the settings beside `rows.jsonl` and returns the command. `updates`: after
which the training ends, if before the epoch does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = list[str]
RANK, ALPHA, BATCH_SIZE, LEARNING_RATE = 16, 32, 4, 1e-4


def with_trl(
    program: Path, folder: Path, model: Path, longest: int, updates: int | None = None
) -> Command:
    """`trl sft`, of which every setting is an option."""
    data = folder / "rows"
    data.mkdir(exist_ok=True)
    link = data / "train.jsonl"
    if not link.is_symlink():
        link.symlink_to(folder / "rows.jsonl")
    settings = {
        "model_name_or_path": model,
        "dtype": "float32",
        "dataset_name": data,
        "use_peft": True,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_modules": "all-linear",
        "max_length": longest,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": folder / "trl",
        **ending(updates),
    }
    return [str(program), "sft", *as_options(settings)]


def with_llamafactory(
    program: Path, folder: Path, model: Path, longest: int, updates: int | None = None
) -> Command:
    """`llamafactory-cli train`, with a file of settings and one that names the data."""
    more = {"template": "default", **ending(updates)}
    settings = write_llamafactory_recipe(folder, model, longest=longest, **more)
    return [str(program), "train", str(settings)]


def write_llamafactory_recipe(
    folder: Path, model: Path | None = None, *, longest: int = 1024, **more: object
) -> Path:
    """Write LLaMA-Factory's recipe for LoRA on `rows.jsonl`; `model`: default `model` beside it.

    `longest`: tokens of a row at most. `more`: further keys of the recipe.
    """
    columns = {"prompt": "prompt", "response": "completion"}
    info = {"rows": {"file_name": "rows.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    recipe = {
        "model_name_or_path": str(model or folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cutoff_len": longest,
        "output_dir": str(folder / "llamafactory"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "report_to": "none",
        **more,
    }
    path = folder / "llamafactory.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    return path


def with_axolotl(
    program: Path, folder: Path, model: Path, longest: int, updates: int | None = None
) -> Command:
    """`axolotl train`, with a file of settings; its CUDA kernels are switched off."""
    write_messages(folder)
    settings = {
        "base_model": str(model),
        "datasets": [{"path": str(folder / "messages.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "axolotl-prepared"),
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "sequence_len": longest,
        "micro_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "attn_implementation": "sdpa",
        "output_dir": str(folder / "axolotl"),
        **ending(updates),
    }
    path = folder / "axolotl.yaml"
    path.write_text(json.dumps(settings), "utf-8")  # JSON is YAML
    return [str(program), "train", str(path), "--launcher", "python"]


def with_swift(
    program: Path, folder: Path, model: Path, longest: int, updates: int | None = None
) -> Command:
    """`swift sft`, of which every setting is an option."""
    settings = {
        "model": model,
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "target_modules": "all-linear",
        "torch_dtype": "float32",
        "dataset": write_messages(folder),
        "max_length": longest,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,
        "report_to": "none",
        "output_dir": folder / "swift",
        **ending(updates),
    }
    return [str(program), "sft", *as_options(settings)]


PEERS: dict[str, Callable[[Path, Path, Path, int, int | None], Command]] = {
    "TRL": with_trl,
    "LLaMA-Factory": with_llamafactory,
    "Axolotl": with_axolotl,
    "ms-swift": with_swift,
}


def ending(updates: int | None) -> dict[str, Any]:
    """The setting that ends a training; all four tools call it `max_steps`."""
    return {} if updates is None else {"max_steps": updates}


def as_options(settings: dict[str, object]) -> Command:
    """`--key value` for each setting."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def write_messages(folder: Path) -> Path:
    """The rows of `rows.jsonl` as conversations, for tools that want them so."""
    path = folder / "messages.jsonl"
    with path.open("w", encoding="utf-8") as messages:
        for line in (folder / "rows.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            pair = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            messages.write(json.dumps({"messages": pair}) + "\n")
    return path
