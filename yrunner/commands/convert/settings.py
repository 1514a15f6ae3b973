"""Read another tool's settings: YAML, JSON, or the command in a shell script or batch file."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yrunner.errors import YRunnerError
from yrunner.recipe.yaml_tree import (
    SourceLocation,
    Unreadable,
    plain,
    read_document,
    read_plain_scalar,
)
from yrunner.text_files import read_json, read_text

TOOLS = ("Axolotl", "LLaMA-Factory", "TRL", "ms-swift", "Y-Trainer")
LAUNCHER = "launcher --"
"""In front of the name of a launcher's option, such as `--num_processes` of accelerate."""
MARKS = {
    "Axolotl": {"base_model", "micro_batch_size", "sequence_len", "datasets", "num_epochs",
                "val_set_size", "sample_packing", "pretraining_dataset", "adapter", "lora_r",
                "lora_target_linear"},
    "LLaMA-Factory": {"model_name_or_path", "finetuning_type", "cutoff_len", "template", "stage",
                      "dataset", "dataset_dir", "do_train", "lora_target", "lora_rank",
                      "train_dataset", "dist_config", "kernel_config", "model_class", "export_dir",
                      "val_size", "max_samples"},
    "TRL": {"model_name_or_path", "dataset_name", "use_peft", "lora_target_modules", "lora_r",
            "dataset_train_split", "dataset_config", "assistant_only_loss", "max_length",
            "load_in_4bit", "max_seq_length", "dataset_text_field", "loss_type", "use_liger_kernel",
            "completion_only_loss", "chat_template_path", "dtype"},
    "ms-swift": {"model", "tuner_type", "train_type", "sft_type", "rlhf_type", "target_modules",
                 "torch_dtype", "split_dataset_ratio", "attn_impl", "dataset", "max_length",
                 "lora_rank", "num_train_epochs", "val_dataset", "model_author"},
    "Y-Trainer": {"model_path_to_load", "training_type", "checkpoint_epoch", "use_NLIRG",
                  "token_batch", "pack_length", "data_path", "enable_gradit_checkpoing", "use_lora",
                  "max_seq_len"},
}  # fmt: skip
"""Keys that tell the tools apart; the tool with most of them is it."""
SURE_OF_IT = 2
OTHER_FILES = {
    "distributed_type": "a configuration of accelerate launch",
    "zero_optimization": "a configuration of DeepSpeed; name it in distributed.deepspeed.config",
    "fsdp": "a configuration of FSDP",
}
LLAMA_FACTORY_PROGRAM = r"llamafactory-cli|lmf|llamafactory"
TRAINERS = "sft|dpo|kto|orpo|cpo|reward|grpo|rloo|gkd"
PROGRAMS = (
    ("ms-swift", re.compile(r"(?:\S*/)?swift (sft|pt|rlhf)\b")),
    ("ms-swift", re.compile(r"(?:\S*/)?swift/cli/(sft|pt|rlhf)\.py\b")),
    ("ms-swift", re.compile(r"-m swift\.cli\.(sft|pt|rlhf)\b")),
    ("Axolotl", re.compile(r"(?:\S*/)?axolotl (train)\b|-m axolotl\.cli\.(train)\b")),
    ("LLaMA-Factory", re.compile(rf"(?:\S*/)?(?:{LLAMA_FACTORY_PROGRAM}) (train)\b")),
    ("LLaMA-Factory", re.compile(r"(?:\S*/)?src/(train)(?:_bash)?\.py\b")),
    ("TRL", re.compile(rf"(?:\S*/)?trl ({TRAINERS})\b")),
    ("TRL", re.compile(rf"(?:\S*/)?({TRAINERS}|reward_modeling)(?:_vlm)?\.py\b")),
    ("Y-Trainer", re.compile(r"(?:\S*[/.])?(start_training)(?:\.py)?\b")),
    ("Y-Trainer", re.compile(r"\S*sch?e?dule\.(sort)\b|\S*schedule/(sort)\.py\b")),
)
"""How the command of each tool begins, and its subcommand."""


ASSIGNMENT = re.compile(
    r"\s*(export\s+|set\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s\"']*)\s*;?\s*(?:#.*)?"
)
"""A line that sets a variable."""


@dataclass
class Settings:
    """What a file says: the keys of one tool, in the order of the file."""

    tool: str
    keys: dict[str, Any]
    command: str = ""
    """The subcommand: sft, dpo, rlhf, train, ..."""
    notes: list[str] = field(default_factory=list)


def read_settings(path: Path, tool: str | None) -> Settings:
    """The settings in a file. Raises `YRunnerError` if there are none, or of no known tool."""
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        keys = read_keys(path)
        return Settings(tool or _tool_of(keys, path), keys)
    return _read_command(read_text(path), path, tool)


def read_keys(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. Raises `YRunnerError` if it holds anything else."""
    if path.suffix.lower() == ".json":
        value = read_json(path)
    else:
        value = _read_yaml(read_text(path), path)
    if not isinstance(value, dict) or not value:
        shape = "empty" if not value else "not a section of keys and values"
        raise YRunnerError(
            f"{path} is {shape}", remedy="give the file that the old tool is run with"
        )
    return value


def _read_yaml(text: str, path: Path) -> Any:
    try:
        root, faults = read_document(text, SourceLocation(0, 1, 1, str(path)))
    except Unreadable as error:
        fault = error.fault
        raise YRunnerError(f"{fault.location}: {fault.message}") from error
    if faults:
        raise YRunnerError("\n".join(f"{fault.location}: {fault.message}" for fault in faults))
    return plain(root)


def _tool_of(keys: Mapping[str, Any], path: Path) -> str:
    for key, what in OTHER_FILES.items():
        if key in keys and "model_name_or_path" not in keys and "base_model" not in keys:
            raise YRunnerError(
                f"{path} is {what}, not the settings of a training",
                remedy="give the settings of the training",
            )
    if {"model", "data"} <= keys.keys():
        raise YRunnerError(f"{path} is a recipe already", remedy=f"run yrun check {path}")
    found = {tool: len(marks & keys.keys()) for tool, marks in MARKS.items()}
    best = max(found.values())
    named = [tool for tool, number in found.items() if number == best]
    if best < SURE_OF_IT or len(named) > 1:
        tools = ", ".join(option_of(tool) for tool in TOOLS)
        raise YRunnerError(
            f"{path} could be the settings of {' or '.join(named) if best else 'no known tool'}",
            remedy=f"name the tool with --from: {tools}",
        )
    return named[0]


def option_of(tool: str) -> str:
    """A tool as `--from` names it: llama-factory."""
    return tool.lower()


def _read_command(text: str, path: Path, tool: str | None) -> Settings:
    lines, exported = _logical_lines(text)
    commands = [found for line in lines if (found := _find_program(line, path)) is not None]
    if tool is not None:
        commands = [found for found in commands if found[0] == tool]
    if not commands:
        raise YRunnerError(
            f"{path} has no training command of {', '.join(TOOLS)}",
            remedy="give the YAML or JSON file, or a script with the command",
        )
    tool, command, before, after = commands[0]
    settings = Settings(tool, {}, command)
    if len(commands) > 1:
        others = ", ".join(f"{name} {word}" for name, word, _, _ in commands[1:])
        settings.notes.append(f"only the first command of {path} is converted, not {others}")
    settings.keys.update(exported | _launcher_keys(before))
    _add_arguments(settings, after, path)
    return settings


def _logical_lines(text: str) -> tuple[list[str], dict[str, Any]]:
    """Lines with their continuations joined and their variables replaced; exported variables."""
    # Word processors make a dash of "--".
    text = re.sub(r"(?<=\s)[\u2013\u2014](?=[A-Za-z])", "--", text)
    text = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(#|::|rem\b)", line))
    text = re.sub(r"[ \t]#[^\n\"']*\\+[ \t]*\n", " ", text)  # a comment before the line goes on
    text = re.sub(r"[\\^`]+[ \t]*(#[^\n]*)?(\n|$)", " ", text)
    variables: dict[str, str] = {}
    exported: dict[str, Any] = {}
    lines = []
    for line in text.split("\n"):
        line = _expand(line, variables)
        assignment = ASSIGNMENT.fullmatch(line)
        if assignment is None:
            lines.append(line)
            continue
        how, name, value = assignment.groups()
        variables[name] = value.strip("\"'")
        if how:
            exported[name] = _value(variables[name])
    return lines, exported


def _expand(line: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2) or match.group(4)
        return variables.get(name, match.group(3) or match.group(0))

    return re.sub(r"\$(\w+)|\$\{(\w+)(?::-([^}]*))?\}|%(\w+)%", value, line)


def _find_program(line: str, path: Path) -> tuple[str, str, list[str], list[str]] | None:
    """Tool, subcommand, and the words before and behind the program; None without a program."""
    if path.suffix.lower() in (".bat", ".cmd", ".ps1"):
        line = line.replace("\\", "/")
    for tool, pattern in PROGRAMS:
        match = pattern.search(line)
        if match is None or (match.start() and line[match.start() - 1] not in " \t\"'"):
            continue
        command = next(word for word in match.groups() if word)
        before, after = line[: match.start()], line[match.end() :].lstrip("\"'")
        try:
            return tool, command, _split(before), _until_end(after)
        except ValueError as error:
            raise YRunnerError(
                f"{path}: the {tool} command cannot be read ({str(error).lower()})",
                remedy="close its quotes",
            ) from error
    return None


def _until_end(text: str) -> list[str]:
    """The words of a command, up to a pipe, a redirection or the next command."""
    found = []
    for word in _split(text):
        if word in ("&&", "||", "|", ";", "&") or re.match(r"[0-9&]?>", word):
            break
        if word.endswith(";"):
            found.append(word[:-1])
            break
        found.append(word)
    return found


def _split(text: str) -> list[str]:
    """The words of a command; a comment begins only where a word does, as `rows.jsonl#500`."""
    words = shlex.split(re.sub(r"(^|\s)#[^\n\"']*$", "", text))
    return [word for word in words if word.strip() or not word]


def _launcher_keys(words: Sequence[str]) -> dict[str, Any]:
    """Environment variables and the launcher's options in front of the program."""
    keys: dict[str, Any] = {}
    name = ""
    for word in words:
        variable = re.fullmatch(r"([A-Z_][A-Z0-9_]*)=(.*)", word)
        if variable:
            keys[variable.group(1)] = _value(variable.group(2))
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            name = LAUNCHER + name[2:]
            keys[name] = _value(value) if equals else True
            name = "" if equals else name
        elif word == "deepspeed":
            keys[f"{LAUNCHER}deepspeed"] = True
        elif name and not word.startswith("-"):
            keys[name] = _value(word)
            name = ""
    return keys


def _add_arguments(settings: Settings, words: Sequence[str], path: Path) -> None:
    """The arguments of a command; those of a YAML file that it names come first."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif name:
            given[name].append(word)
        elif "=" in word:  # OmegaConf: key=value
            key, _, value = word.partition("=")
            given[key] = [value]
        else:
            given["config"] = [word]
    for key in ("config", "c"):
        files = given.pop(key, [])
        if files and files[0].endswith((".yaml", ".yml", ".json")):
            settings.keys.update(read_keys(_beside(path, files[0])))
    for key, values in given.items():
        settings.keys[key] = _argument(values)


def _beside(path: Path, name: str) -> Path:
    for folder in (Path.cwd(), path.parent, *path.resolve().parents):
        if (folder / name).is_file():
            return folder / name
    raise YRunnerError(
        f"there is no file {name}, which {path} names", remedy="run this where the old tool runs"
    )


def _argument(values: Sequence[str]) -> Any:
    if len(values) > 1:
        return [_value(value) for value in values]
    return _value(values[0]) if values else True


def _value(text: str) -> Any:
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return read_plain_scalar(text)
