"""Axolotl's settings."""

import re
from collections.abc import Mapping
from typing import Any

from yrunner.commands.convert.conversion import (
    Conversion,
    Entry,
    Outcome,
    decimal,
    known_keys,
    leaves,
    number,
)
from yrunner.commands.convert.data import (
    SAME_ROLES,
    TURN_KEYS,
    add_source,
    count_or_share,
    template,
)
from yrunner.commands.convert.generated import convert_rewarded
from yrunner.commands.convert.leftovers import convert_leftovers
from yrunner.commands.convert.training_arguments import (
    Defaults,
    Names,
    convert_common,
    convert_lora,
    ignore_lora,
    targets,
)

NAMES = Names(
    base="base_model",
    epochs="num_epochs",
    batch="micro_batch_size",
    eval_batch="eval_batch_size",
    optimizer="optimizer",
    scheduler="lr_scheduler",
    rank="lora_r",
)
DEFAULTS = Defaults(epochs=1, batch=1, learning_rate=2e-5, scheduler="cosine", warmup_ratio=0.03)
FILE_KINDS = ("json", "jsonl", "csv", "parquet", "text", "arrow")
CHAT = ("chat_template", "chat_template.default", "sharegpt", "chat_template.argilla")
ASKING = (
    "jeopardy",
    "gpteacher",
    "explainchoice",
    "summarizetldr",
    "context_qa",
    "alpaca_w_system",
)
REWARDED = {"max_completion_length": 512, "beta": 0.0, "loss_type": "dapo"}
"""TRL's defaults that differ here."""
PREFERENCES = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}


def convert_axolotl(c: Conversion) -> None:
    """Convert what is left of Axolotl's settings."""
    convert_common(c, NAMES, DEFAULTS)
    if c.get("base_model"):
        c.carry("base_model", "model.base", c.model(c.get("base_model")))
    _tuning(c)
    _stage(c)
    _datasets(c)
    _lengths(c)
    _rhythm(c)
    _evaluation(c)
    template(c, "chat_template", c.get("chat_template"))
    if c.get("default_system_message"):
        c.carry("default_system_message", "data.system")
    c.fill("distributed.processes", "auto", "Axolotl uses every GPU")
    convert_leftovers(c)


def _tuning(c: Conversion) -> None:
    adapter = c.get("adapter")
    four, eight = number(c.get("load_in_4bit")) is True, number(c.get("load_in_8bit")) is True
    if adapter in ("lora", "qlora"):
        is_quantized = adapter == "qlora" or four or eight
        kind = "qlora" if is_quantized else "lora"
        c.carry(
            "adapter", "tuning.kind", kind, "8 or 4 bits are qlora here" if kind != adapter else ""
        )
        if eight and not four:
            c.carry("load_in_8bit", "tuning.quant_type", "int8")
        c.same("load_in_4bit", "tuning.kind qlora says so") if four else None
        convert_lora(c, rank="lora_r", dropout=0.0)
        _targets(c)
        if c.get("lora_model_dir"):
            _continue_adapter(c)
    else:
        if adapter:
            c.carry("adapter", "tuning.kind", "lora", f"{adapter} there")
        elif c.get("unfrozen_parameters"):
            how = "the last half of the layers; see tuning.train_top"
            c.carry("unfrozen_parameters", "tuning.kind", "freeze", how)
        else:
            c.fill("tuning.kind", "full", "no adapter")
        c.same("adapter", "none: all weights are trained") if not adapter else None
        ignore_lora(c, "no adapter is trained")
    for key in ("load_in_4bit", "load_in_8bit"):
        if number(c.get(key)) is True:
            c.ignored(key, "no adapter is trained")


def _targets(c: Conversion) -> None:
    if number(c.get("lora_target_linear")) is True:
        c.carry("lora_target_linear", "tuning.targets", "all-linear")
        c.changed("lora_target_modules", "all linear layers include them", "tuning.targets")
    else:
        targets(c, "lora_target_modules")


def _continue_adapter(c: Conversion) -> None:
    c.carry("lora_model_dir", "tuning.adapter", c.model(c.get("lora_model_dir")))
    for name in ("rank", "alpha", "dropout", "targets", "variant"):
        c.revise(f"tuning.{name}", None, "the adapter has its own")


def _stage(c: Conversion) -> None:
    method = c.get("rl")
    if number(c.get("reward_model")) is True:
        c.carry("reward_model", "train.stage", "reward")
        c.put("loss.kind", "bradley_terry")
        if c.get("center_rewards_coefficient"):
            c.carry("center_rewards_coefficient", "loss.center")
    elif isinstance(method, str) and method in PREFERENCES:
        _preference(c, method)
    elif method == "grpo":
        c.carry("rl", "loss.kind", "grpo")
        convert_rewarded(c, "grpo", REWARDED, "trl.")
    elif method:
        c.obstacles.append(f"rl: {method} is not converted; see docs/guide/rl.md")
        c.without("rl", "use dpo, ipo, kto, orpo, simpo or grpo")
    elif number(c.get("process_reward_model")) is True:
        c.obstacles.append("process_reward_model has no counterpart here")
    elif c.get("pretraining_dataset"):
        c.put("train.stage", "cpt")
    if number(c.get("use_eaft")) is True:
        c.carry("use_eaft", "loss.kind", "eaft")
        c.carry("eaft_alpha", "loss.alpha") if c.get("eaft_alpha") else None


def _preference(c: Conversion, method: str) -> None:
    c.carry("rl", "loss.kind", PREFERENCES[method])
    c.put("train.stage", "preference")
    if method == "ipo":
        c.put("loss.form", "ipo")
        c.put("loss.length", "mean", "as TRL computes ipo")
    for key in ("rl_beta", "dpo_beta", "orpo_alpha" if method == "orpo" else "rl_beta"):
        if c.get(key) is not None:
            c.carry(key, "loss.beta", decimal(c.get(key)))
    if method == "orpo":
        c.fill("loss.beta", 0.1, "default of Axolotl")
    for key, place, methods in (
        ("rpo_alpha", "loss.sft", ("dpo",)),
        ("simpo_gamma", "loss.gamma", ("simpo",)),
        ("cpo_alpha", "loss.sft", ("simpo",)),
        ("kto_desirable_weight", "loss.desirable_weight", ("kto",)),
        ("kto_undesirable_weight", "loss.undesirable_weight", ("kto",)),
    ):
        if c.get(key) is not None and method in methods:
            c.carry(key, place, decimal(c.get(key)))
    smoothing = number(c.get("dpo_label_smoothing", 0))
    if smoothing and method == "dpo":
        c.carry("dpo_label_smoothing", "loss.label_smoothing", float(smoothing))
        c.put("loss.form", "conservative")


def _lengths(c: Conversion) -> None:
    c.carry("sequence_len", "data.max_length", number(c.get("sequence_len")))
    c.fill("data.max_length", 512, "default of Axolotl")
    strategy = str(c.get("excess_length_strategy", "drop"))
    ours = {"drop": "drop", "truncate": "cut", "raise": "refuse"}.get(strategy, "drop")
    if not c.carry("excess_length_strategy", "data.too_long", ours):
        if c.values.get("train.stage") == "cpt":
            c.fill("data.too_long", "split", "Axolotl divides long texts")
        c.fill("data.too_long", ours, "Axolotl drops rows above sequence_len")
    c.fill("data.invalid", "drop", "Axolotl leaves out rows without an answer")
    if number(c.get("sample_packing")) is True:
        if c.values.get("train.stage") in ("preference", "reward", "rl"):
            c.ignored("sample_packing", "pairs and prompts are not packed")
        else:
            c.carry("sample_packing", "data.packing", True)
    _learned_tokens(c)
    if c.get("curriculum_sampling"):
        c.carry("curriculum_sampling", "train.order", "as_written")
    if c.left.get("shuffle_merged_datasets") is False:
        c.carry("shuffle_merged_datasets", "train.order", "as_written")
    elif c.get("shuffle_merged_datasets"):
        c.same("shuffle_merged_datasets", "as here")


def _learned_tokens(c: Conversion) -> None:
    if number(c.get("train_on_inputs")) is True:
        c.carry("train_on_inputs", "data.targets", "all")
    c.same("train_on_inputs", "false, as here")
    if c.get("roles_to_train") is not None:
        own = set(c.get("roles_to_train")) <= {"assistant", "gpt"}
        c.same("roles_to_train", "the assistant, as here") if own else c.without(
            "roles_to_train", "only assistant turns, or all tokens; see data.targets"
        )
    for key in ("train_on_eos", "train_on_eot"):
        if c.get(key) == "turn":
            c.same(key, "the end of each learned turn, as here")


def _evaluation(c: Conversion) -> None:
    """Tasks of lm-evaluation-harness; `yrun train` measures before and after."""
    tasks = c.get("lm_eval_tasks")
    if isinstance(tasks, list) and tasks and all(isinstance(task, str) for task in tasks):
        task = {"name": "harness", "kind": "harness", "side": "general", "tasks": tasks}
        c.carry("lm_eval_tasks", "eval.tasks", [task])
        if number(c.get("lm_eval_post_train")) is True:
            c.same("lm_eval_post_train", "measured before and after the training")


def _rhythm(c: Conversion) -> None:
    saves = number(c.get("saves_per_epoch"))
    if saves:
        how = "" if saves == 1 else f"{saves} per epoch there; see train.checkpoint.every"
        c.carry("saves_per_epoch", "train.checkpoint.every", "epoch", how)
    if c.get("evals_per_epoch"):
        c.changed("evals_per_epoch", "validates at every checkpoint, see train.checkpoint.every")
    config = c.get("bnb_config_kwargs")
    if isinstance(config, dict) and c.values.get("tuning.kind") == "qlora":
        kind, double = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_use_double_quant")
        c.put("tuning.quant_type", kind) if kind in ("nf4", "fp4") else None
        c.put("tuning.double_quant", double) if isinstance(double, bool) else None
        c.record("bnb_config_kwargs", Outcome.CARRIED, "tuning.quant_type", "also double_quant")


def _datasets(c: Conversion) -> None:
    key = "datasets" if c.get("datasets") else "pretraining_dataset"
    if isinstance(c.get(key), str):
        path = c.get(key)
        c.record(key, Outcome.CARRIED, "data.train")
        add_source(c, "data.train", c.data(path))
    else:
        _sources(c, key, "data.train")
    if any(source.get("format") == "text" for source in c.values.get("data.train", ())):
        c.values.setdefault("train.stage", "cpt")
    share = number(c.get("val_set_size", 0))
    if _sources(c, "test_datasets", "data.validation"):
        c.ignored("val_set_size", "test_datasets counts instead")
    elif share:
        count_or_share(c, "val_set_size", share)


def _sources(c: Conversion, key: str, place: str) -> bool:
    """Convert a list of datasets; what is none stays for the end. False without any."""
    given = c.get(key)
    listed = [given] if isinstance(given, Mapping) and given else given
    if not isinstance(listed, list) or not listed or not all(map(_is_dataset, listed)):
        return False
    del c.left[key]
    for index, dataset in enumerate(listed):
        where = f"{key}[{index}]" if listed is given else key
        _Source(c, where, dict(dataset), place).convert()
    return True


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value


class _Source:
    """An entry of `datasets` on its way into one of `data.train`."""

    def __init__(self, c: Conversion, where: str, left: dict[str, Any], place: str) -> None:
        self.c, self.where, self.left, self.place = c, where, left, place
        self.entry: dict[str, Any] = {}
        self.columns: dict[str, str] = {}

    def done(self, key: str, outcome: Outcome, note: str = "") -> None:
        if key in self.left:
            value = self.left.pop(key)
            place = self.place if outcome in (Outcome.CARRIED, Outcome.CHANGED) else ""
            self.c.entries += [
                Entry(name, inner, outcome, place, note)
                for name, inner in leaves(f"{self.where}.{key}", value)
            ]

    def convert(self) -> None:
        self.read_path()
        self.read_part()
        self.read_type()
        self.read_turns()
        self.read_columns()
        for key in list(self.left):
            if self.left[key] in (None, False, [], {}):
                self.done(key, Outcome.CARRIED, "off, as here")
            elif key in known_keys("Axolotl datasets"):
                self.done(key, Outcome.WITHOUT, "change the rows instead")
            else:
                self.done(key, Outcome.IGNORED, "unknown to Axolotl")
        if self.columns:
            self.entry["columns"] = self.columns
        add_source(self.c, self.place, self.entry)

    def read_path(self) -> None:
        path, files = str(self.left.get("path", "")), self.left.get("data_files")
        named = [files] if isinstance(files, str) else list(files or ())
        if path in FILE_KINDS and named:
            self.entry |= self.c.data(named[0])
            for more in named[1:]:
                add_source(self.c, self.place, self.c.data(more))
        elif "://" in path:
            self.c.missing.append(path)
            self.entry["file"] = path
        else:
            self.entry |= self.c.data(path)
            if named and "hub" in self.entry:
                self.entry["files"] = named[0]
            elif named:
                self.entry |= self.c.data(f"{path}/{named[0]}")
        self.done("path", Outcome.CARRIED)
        self.done("data_files", Outcome.CARRIED)
        self.done("ds_type", Outcome.CARRIED, "read from the name of the file")

    def read_part(self) -> None:
        split = str(self.left.get("split") or "train")
        name, _, part = split.partition("[")
        share = re.fullmatch(r":(\d+)(%?)\]", part)
        if share and share.group(2):
            self.entry["share"] = int(share.group(1)) / 100
        elif share:
            self.entry["take"] = int(share.group(1))
        if name != "train" and "hub" in self.entry and "files" not in self.entry:
            self.entry["files"] = f"*{name}*"
        how = "" if split == "train" else "rows chosen at random, files by their name"
        self.done("split", Outcome.CHANGED if how else Outcome.CARRIED, how)
        if self.left.get("name") and "hub" in self.entry and "files" not in self.entry:
            self.entry["files"] = f"*{self.left['name']}*"
            self.done("name", Outcome.CHANGED, "the files whose names have it")
        if self.left.get("revision") and "hub" in self.entry:
            self.entry["revision"] = self.left["revision"]
            self.done("revision", Outcome.CARRIED)

    def read_type(self) -> None:
        kind = self.left.get("type")
        if isinstance(kind, Mapping):
            self.read_own_type(kind)
            return
        base = str(kind or "").split(":")[0]
        if base == "alpaca" or base.startswith("alpaca"):
            self.entry["format"] = "alpaca"
            self.done("type", Outcome.CHANGED, "the model's chat template instead of Alpaca's text")
        elif base in CHAT or base.endswith((".chat_template", ".default")) or base == "":
            self.done("type", Outcome.CARRIED)
        elif base in ("completion", "pretrain", "pretraining"):
            self.read_text()
        elif base in ASKING or self.c.values.get("train.stage") in ("preference", "reward", "rl"):
            self.done(
                "type", Outcome.CHANGED, "the form is found by the columns, see data.train.format"
            )
        else:
            self.done("type", Outcome.WITHOUT, "name the columns in data.train.columns")

    def read_text(self) -> None:
        self.entry["format"] = "text"
        column = self.left.get("field") or self.left.get("text_column")
        if column and column != "text":
            self.columns["text"] = column
        for key in ("type", "field", "text_column"):
            self.done(key, Outcome.CARRIED)

    def read_own_type(self, kind: Mapping[str, Any]) -> None:
        """`type` with fields and formats of its own."""
        names = {
            "field_system": "system", "field_instruction": "instruction", "field_input": "input",
            "field_output": "output", "field_prompt": "prompt", "field_chosen": "chosen",
            "field_rejected": "rejected",
        }  # fmt: skip
        for key, value in kind.items():
            where = f"{self.where}.type.{key}"
            if key in names and value:
                if names[key] != value:
                    self.columns[names[key]] = value
                self.c.entries.append(Entry(where, value, Outcome.CARRIED, self.place))
            elif key == "system_prompt" and value:
                self.c.values.setdefault("data.system", value)
                self.c.entries.append(Entry(where, value, Outcome.CARRIED, "data.system"))
            else:
                note = "the model's chat template instead"
                self.c.entries.append(Entry(where, value, Outcome.CHANGED, self.place, note))
        if "field_prompt" in kind:
            self.entry["format"] = "prompt_response"
        elif "field_instruction" in kind or "field_output" in kind:
            self.entry["format"] = "alpaca"
        del self.left["type"]

    def read_turns(self) -> None:
        column = self.left.get("field_messages")
        stage = self.c.values.get("train.stage")
        if stage not in ("preference", "reward") and self.entry.get("format") is None:
            if column in (None, "messages", "conversations", "conversation"):
                self.done("field_messages", Outcome.CARRIED, "found by its name")
            else:
                self.entry["format"] = "messages"
                self.columns["messages"] = column
                self.done("field_messages", Outcome.CARRIED)
        elif column:
            self.columns["messages"] = column
            self.entry["format"] = "messages"
            self.done("field_messages", Outcome.CARRIED)
        mappings = self.left.get("message_property_mappings") or {}
        own = {"role": "role", "content": "content", **mappings}
        names = {own["role"], own["content"], self.left.get("message_field_role", "role"),
                 self.left.get("message_field_content", "content")}  # fmt: skip
        if names <= TURN_KEYS:
            for key in ("message_property_mappings", "message_field_role", "message_field_content"):
                self.done(key, Outcome.CARRIED, "found by their names")
        roles = self.left.get("roles") or {}
        if all(set(_all(named)) <= SAME_ROLES.get(role, set()) for role, named in roles.items()):
            self.done("roles", Outcome.CARRIED, "found by their names")

    def read_columns(self) -> None:
        for key, name in (
            ("field_system", "system"),
            ("field_tools", "tools"),
            ("field_chosen", "chosen"),
            ("field_rejected", "rejected"),
            ("field_thinking", "reasoning_content"),
            ("template_thinking_key", "reasoning_content"),
        ):
            value = self.left.get(key)
            if value and value == name:
                self.done(key, Outcome.CARRIED, "found by its name")
            elif value and name != "reasoning_content":
                self.columns[name] = value
                self.done(key, Outcome.CARRIED)
        if self.left.get("type") is None and "train_on_eos" in self.left:
            if self.left["train_on_eos"] == "turn":
                self.done("train_on_eos", Outcome.CARRIED, "as here")
        if self.left.get("roles_to_train") in (["assistant"], ["gpt"], ["assistant", "gpt"]):
            self.done("roles_to_train", Outcome.CARRIED, "as here")
        if self.left.get("chat_template"):
            self.done(
                "chat_template", Outcome.WITHOUT, "one template for all data: model.chat_template"
            )


def _all(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
