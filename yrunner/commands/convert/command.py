"""`yrun convert`: from the settings of another tool to a recipe and a list of every key."""

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yrunner.commands.convert.axolotl import convert_axolotl
from yrunner.commands.convert.conversion import Conversion, Entry, Outcome
from yrunner.commands.convert.llama_factory import convert_llama_factory
from yrunner.commands.convert.ms_swift import convert_ms_swift
from yrunner.commands.convert.settings import LAUNCHER, TOOLS, Settings, option_of, read_settings
from yrunner.commands.convert.trl import convert_trl
from yrunner.commands.convert.y_trainer import convert_y_trainer
from yrunner.console import say, warn
from yrunner.errors import RecipeError, YRunnerError
from yrunner.recipe.load import check_text, parse_values, yaml_line
from yrunner.recipe.schema.distributed import SHARED_OPTIMIZERS
from yrunner.recipe.schema.model import ADAPTER_SHAPE
from yrunner.storage.run_dir import write_text

SECTIONS = ("name", "output", "seed", "model", "tuning", "data", "rewards", "rollout",
            "loss", "teacher", "keep", "drift", "train", "distributed", "sort", "eval",
            "merge")  # fmt: skip
"""Of a recipe, in their usual order."""
FIRST_KEYS = ("kind", "stage", "base", "file", "hub")
LIST_ORDER = (Outcome.CHANGED, Outcome.WITHOUT, Outcome.IGNORED, Outcome.CARRIED)
PROCESSES = ("num_processes", "nproc_per_node", "nproc-per-node", "num_gpus", "num_machines")
"""Options of launchers that say how many processes there are."""
VALUE_WIDTH = 48
"""Characters of an old value in the list."""


def convert(
    path: Path,
    overrides: Sequence[str],
    *,
    tool: str | None,
    output: Path,
    force: bool,
    allow_missing: bool,
    as_machine: bool,
) -> None:
    """Write the recipe that does what the settings in `path` did, and print the list of their keys.

    Raises `YRunnerError` if the file is not settings of a known tool, if nothing here does what
    they do, or if `output` exists.
    """
    if output.exists() and not force:
        raise YRunnerError(
            f"{output} already exists", remedy="name another file with -o, or add --force"
        )
    c, settings = convert_settings(path, tool=tool, recipe_folder=output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    problem = None
    text = ""
    try:
        text = recipe_text(c, path, overrides, output=output, allow_missing=allow_missing)
    except YRunnerError as error:
        problem = error
    print_list(c, None if problem else output, problem, as_machine=as_machine)
    for note in settings.notes:
        warn(note)
    if problem is not None:
        raise problem
    write_text(output, text)
    if not as_machine:
        for line in missing_packages(c.values):
            warn(line)
        say(f"the recipe is in {output}; next: yrun check {output}")


def missing_packages(values: Mapping[str, Any]) -> list[str]:
    """What this machine lacks for the recipe, and how to go on."""
    found = []
    if values.get("model.attention") == "flash_attention_2" and find_spec("flash_attn") is None:
        found.append(
            "this machine has no package flash-attn; install it, or add model.attention=auto to "
            "the commands"
        )
    is_quantized = values.get("tuning.kind") == "qlora"
    optimizer = str(values.get("train.optimizer", ""))
    is_small = re.search("8bit|32bit|paged", optimizer) is not None
    if (is_quantized or is_small) and find_spec("bitsandbytes") is None:
        needs = "tuning.kind: qlora" if is_quantized else f"train.optimizer: {optimizer}"
        found.append(f"{needs} needs bitsandbytes; run pip install 'yrunner[qlora]'")
    return found


def convert_settings(
    path: Path, *, tool: str | None, recipe_folder: Path
) -> tuple[Conversion, Settings]:
    """The conversion of a file, finished as far as recipes can say it."""
    settings = read_settings(path, tool_named(tool))
    c = Conversion(settings.tool, dict(settings.keys), path.parent, recipe_folder)
    _launcher(c)
    converters: Mapping[str, Callable[[Conversion], None]] = {
        "Axolotl": convert_axolotl,
        "LLaMA-Factory": convert_llama_factory,
        "TRL": partial(convert_trl, command=settings.command),
        "ms-swift": partial(convert_ms_swift, command=settings.command),
        "Y-Trainer": partial(convert_y_trainer, command=settings.command),
    }
    converters[settings.tool](c)
    assert not c.left, "every key is in the list"
    _settle(c)
    return c, settings


def tool_named(option: str | None) -> str | None:
    """The tool that `--from` names, in any spelling; None without the option."""
    if option is None:
        return None
    plain = re.sub(r"[^a-z]", "", option.lower())
    for tool in TOOLS:
        if re.sub(r"[^a-z]", "", tool.lower()) == plain:
            return tool
    names = ", ".join(map(option_of, TOOLS))
    raise YRunnerError(f'--from "{option}" is not a tool known here', remedy=f"use one of {names}")


def _launcher(c: Conversion) -> None:
    """Environment variables and launcher options: only the number of processes is of use here."""
    for key in list(c.left):
        name = key.removeprefix(LAUNCHER)
        value = c.left[key]
        if key == "NPROC_PER_NODE" or (key != name and name in PROCESSES):
            if isinstance(value, int) and value > 0 and name != "num_machines":
                c.carry(key, "distributed.processes", value)
            else:
                c.changed(
                    key, "see distributed.machines" if name == "num_machines" else "one per GPU"
                )
        elif key != name and name == "include":
            gpus = len(str(value).rpartition(":")[2].split(","))
            c.carry(key, "distributed.processes", gpus, "set CUDA_VISIBLE_DEVICES for these GPUs")
        elif key != name:
            c.without(key, "yrun train starts its processes; see distributed")
        elif re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            c.without(key, "set it in front of yrun as well, if it is still needed")


def _settle(c: Conversion) -> None:
    """Change what does not go together here."""
    stage = c.values.get("train.stage")
    if stage == "reward":
        _settle_reward(c)
    if stage in ("preference", "reward", "rl"):
        without = ("data.targets", "data.packing", "train.token_batch")
        _drop(c, without, f"not with train.stage {stage}")
    if "tuning.adapter" in c.values:
        _drop(c, [f"tuning.{name}" for name in ADAPTER_SHAPE], "the adapter has its own")
    if not (c.values.get("data.validation") or "data.validation_share" in c.values):
        need_rows = ("train.early_stopping.patience", "train.validate_every")
        _drop(c, need_rows, "there are no validation rows")
    if any(key.startswith("tuning.") for key in c.values):
        c.values.setdefault("tuning.kind", "lora")
    _settle_sharding(c)
    if c.values.get("model.new_tokens"):
        _settle_new_tokens(c)
    if stage == "rl" or c.values.get("teacher.on_policy"):
        _settle_writing(c)


OF_DEEPSPEED = tuple(f"distributed.deepspeed.{key}" for key in ("stage", "offload", "config"))


def _drop(c: Conversion, places: Sequence[str], why: str) -> None:
    for place in places:
        if place in c.values:
            c.revise(place, None, why)


def _settle_reward(c: Conversion) -> None:
    """A reward model is saved whole, on weights that are not quantized."""
    if c.values.get("tuning.kind") == "qlora":
        c.revise("tuning.kind", "lora", "a reward model is not trained on quantized weights")
        _drop(c, ("tuning.quant_type", "tuning.double_quant"), "see tuning.kind")
    others = ("tuning.adapter", "tuning.modules_to_save", *OF_DEEPSPEED)
    _drop(c, others, "not with train.stage reward")


def _settle_new_tokens(c: Conversion) -> None:
    """New tokens mean nothing before they are trained."""
    kind, why = c.values.get("tuning.kind"), "new tokens are to be trained"
    if "tuning.adapter" in c.values:
        c.revise("model.new_tokens", None, "the adapter was trained without them")
    elif kind == "freeze":
        c.put("tuning.embeddings", True, why)
    elif kind in ("lora", "qlora") and "tuning.modules_to_save" not in c.values:
        c.put("tuning.train_tokens", c.values["model.new_tokens"], why)
        if c.values.get("distributed.deepspeed.stage") == 3:
            c.revise("distributed.deepspeed.stage", 2, "3 there; tokens need whole embeddings")


def _settle_writing(c: Conversion) -> None:
    """The model writes answers while it trains."""
    without = ("data.packing", "train.token_batch")
    _drop(c, without, "how long an answer will be is not known before")
    if c.values.get("data.targets") == "all":
        c.revise("data.targets", None, "questions are not learned where answers are written")
    if c.values.get("teacher.on_policy") and c.values.get("distributed.deepspeed.stage") == 3:
        c.revise("distributed.deepspeed.stage", 2, "3 there; answers need the whole weights here")
    is_alone = c.values.get("distributed.processes", 1) == 1 and not any(
        key.startswith("distributed.deepspeed") for key in c.values
    )
    is_plain = c.values.get("tuning.kind") == "lora" and not {
        "tuning.variant",
        "tuning.modules_to_save",
    } & set(c.values)
    if not (is_alone and is_plain):
        why = "vLLM writes for a plain LoRA in one process; here transformers writes"
        _drop(c, ("rollout.engine", "rollout.gpu_share"), why)


def _settle_sharding(c: Conversion) -> None:
    if not any(key.startswith("distributed.deepspeed") for key in c.values):
        return
    if c.values.get("train.optimizer", "adamw_torch") not in SHARED_OPTIMIZERS:
        c.revise("train.optimizer", "adamw_torch", "DeepSpeed shards the optimizer's state")
    without = ("train.torch_compile", "tuning.modules_to_save", "tuning.lora_plus_ratio")
    _drop(c, without, "not with DeepSpeed")
    if c.values.get("tuning.kind") == "qlora" and c.values.get("distributed.deepspeed.stage") == 3:
        c.revise("distributed.deepspeed.stage", 2, "ZeRO 3 cannot shard quantized weights")
    c.fill("distributed.processes", "auto", "one per GPU")


def recipe_text(
    c: Conversion, path: Path, overrides: Sequence[str], *, output: Path, allow_missing: bool
) -> str:
    """The recipe as commented YAML, loaded once. Raises `YRunnerError` if there can be none."""
    given = parse_values(overrides)
    for key, value in given.items():
        c.put(key, value, "from the command")
    obstacles = list(c.obstacles)
    if "model.base" not in c.values:
        obstacles.append("it names no model; add model.base=... to the command")
    if "data.train" not in c.values:
        obstacles.append('it names no data; add "data.train=[{file: rows.jsonl}]" to the command')
    if obstacles:
        raise YRunnerError(f"{path}: {'; '.join(obstacles)}", remedy="no recipe is written")
    if c.missing and not allow_missing:
        raise YRunnerError(
            f"{path} names what is not here: {', '.join(dict.fromkeys(c.missing))}",
            remedy="run this where the old tool runs, or add --allow-missing",
        )
    c.values.setdefault("name", _run_name(c, path))
    return _accepted_text(c, path, output, given)


def _accepted_text(c: Conversion, path: Path, output: Path, given: Container[str]) -> str:
    """The recipe without the values that the schema refuses; never without those of `given`."""
    while True:
        text = commented_yaml(c, f"# {path.name} of {c.tool}, converted by yrun convert")
        try:
            check_text(text, output, with_files=not c.missing)
        except RecipeError as error:
            refused = {
                place: problem.message
                for problem in error.problems
                for place in c.values
                if place not in given and f"{problem.path}.".startswith(f"{place}.")
            }
            if not refused or {"model.base", "data.train"} & refused.keys():
                raise
            for place, message in refused.items():
                c.revise(place, None, f"left out, because it {message}")
        else:
            return text


def _run_name(c: Conversion, path: Path) -> str:
    """A name from the output folder, or else from the file."""
    for text in (Path(str(c.values.get("output", ""))).name, path.stem):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
        if name and name not in ("out", "output", "outputs", "outputdir"):
            return name
    return "converted"


def commented_yaml(c: Conversion, title: str) -> str:
    """The values as YAML, sections in their usual order, comments behind their lines."""
    root: dict[str, Any] = {}
    for place, value in c.values.items():
        section = root
        *above, last = place.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    lines = [title]
    for name in sorted(root, key=_section_order):
        lines += _lines(root[name], name, 0, c.comments)
    return "\n".join(lines) + "\n"


def _section_order(name: str) -> int:
    return SECTIONS.index(name) if name in SECTIONS else len(SECTIONS)


def _lines(value: Any, place: str, depth: int, comments: Mapping[str, str]) -> list[str]:
    key, indent = place.rpartition(".")[2], "  " * depth
    comment = " ".join(comments.get(place, "").split())
    behind = f"  # {comment}" if comment else ""
    if isinstance(value, dict) and value and place.count(".") < 2 and depth == place.count("."):
        inner = sorted(value, key=lambda name: name not in FIRST_KEYS)
        below = [
            line
            for name in inner
            for line in _lines(value[name], f"{place}.{name}", depth + 1, comments)
        ]
        return [f"{indent}{key}:{behind}", *below]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = [f"{indent}{key}:{behind}"]
        for item in value:
            marks = ["- ", *["  "] * (len(item) - 1)]
            lines += [
                f"{indent}  {mark}{name}: {yaml_line(inner)}"
                for mark, (name, inner) in zip(marks, item.items(), strict=True)
            ]
        return lines
    return [f"{indent}{key}: {yaml_line(value)}{behind}"]


def print_list(
    c: Conversion, written: Path | None, problem: YRunnerError | None, *, as_machine: bool
) -> None:
    """Every key of the old settings once, by what became of it."""
    if as_machine:
        found = {
            "tool": c.tool,
            "recipe": None if written is None else str(written),
            "problem": None if problem is None else str(problem),
            "keys": [{**vars(entry), "outcome": entry.outcome.value} for entry in c.entries],
            "defaults": {place: c.values.get(place) for place in c.defaults},
            "missing": c.missing,
        }
        say(json.dumps(found, ensure_ascii=False, indent=2, default=str))
        return
    for outcome in LIST_ORDER:
        entries = [entry for entry in c.entries if entry.outcome is outcome]
        if entries:
            say(f"{outcome.value.replace('the old tool', c.tool)} ({len(entries)}):")
            for line in _grouped(entries, c):
                say(f"  {line}")
    written_out = [place for place in c.defaults if place in c.values]
    if written_out:
        say(f"defaults of {c.tool} that differ here, written out ({len(written_out)}):")
        for place in written_out:
            say(f"  {place}: {yaml_line(c.values[place])} ({c.comments.get(place, '')})")


def _grouped(entries: Sequence[Entry], c: Conversion) -> list[str]:
    """A line per key that has a line in the recipe; the others with the same note share one."""
    lines: list[str] = []
    together: dict[str, list[str]] = {}
    for entry in entries:
        if entry.place:
            value = c.values.get(entry.place)
            now = f": {_short(value)}" if not isinstance(value, list | dict | None) else ""
            note = f" ({entry.note})" if entry.note else ""
            lines.append(f"{entry.key}: {_short(entry.value)} -> {entry.place}{now}{note}")
        else:
            together.setdefault(entry.note, []).append(entry.key)
    return lines + [f"{', '.join(keys)}: {note}" for note, keys in together.items()]


def _short(value: Any) -> str:
    text = yaml_line(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[:VALUE_WIDTH]}..."
