"""LLaMA-Factory's settings, with the entries of its dataset_info.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yrunner.commands.convert.conversion import (
    Conversion,
    Entry,
    Outcome,
    has_key,
    is_number,
    number,
    words,
)
from yrunner.commands.convert.data import (
    SAME_ROLES,
    TURN_KEYS,
    add_source,
    count_or_share,
    take_rows,
    template,
)
from yrunner.commands.convert.leftovers import convert_leftovers
from yrunner.commands.convert.settings import read_keys
from yrunner.commands.convert.training_arguments import (
    Defaults,
    Names,
    convert_common,
    convert_lora,
    ignore_lora,
    targets,
)
from yrunner.text_files import read_json

NAMES = Names(attention="flash_attn")
DEFAULTS = Defaults(gradient_checkpointing=True)
STAGES = {"pt": "cpt", "sft": "sft", "rm": "reward", "dpo": "preference", "kto": "preference",
          "ppo": "rl"}  # fmt: skip
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
OTHER_COLUMNS = ("history", "system", "tools", "chosen", "rejected")
TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
}
MEDIA = ("images", "videos", "audios")
VERSION_1 = {
    "model": "model_name_or_path",
    "train_dataset": "dataset",
    "eval_dataset": "eval_dataset",
    "micro_batch_size": "per_device_train_batch_size",
}
"""Keys of LLaMA-Factory's version 1 that have other names before it."""
FREEZE_SHARE = 0.1


def convert_llama_factory(c: Conversion) -> None:
    """Convert what is left of LLaMA-Factory's settings."""
    is_version_1 = "model" in c.left and "model_name_or_path" not in c.left
    names = Names(
        base="model" if is_version_1 else NAMES.base,
        batch="micro_batch_size" if is_version_1 else NAMES.batch,
        attention=NAMES.attention,
    )
    if c.get("export_dir") and not c.get("dataset"):
        c.obstacles.append("these settings merge an adapter and train nothing; see yrun merge")
    if c.left.get("disable_gradient_checkpointing") is True:
        c.carry("disable_gradient_checkpointing", "train.gradient_checkpointing", False)
    convert_common(c, names, DEFAULTS)
    if c.get(names.base):
        c.carry(names.base, "model.base", c.model(c.get(names.base)))
    if is_version_1:
        _version_1(c)
    else:
        _tuning(c)
        _stage(c)
        _datasets(c, "dataset", "data.train")
        _datasets(c, "eval_dataset", "data.validation")
    _lengths(c)
    _template(c)
    c.fill("distributed.processes", "auto", "LLaMA-Factory uses every GPU")
    convert_leftovers(c)


def _tuning(c: Conversion) -> None:
    kind = c.get("finetuning_type", "lora")
    bits = number(c.get("quantization_bit"))
    if kind == "oft":
        c.carry("finetuning_type", "tuning.kind", "lora", "OFT has no counterpart")
    elif kind != "lora":
        ours = kind if kind in ("full", "freeze") else "lora"
        c.carry("finetuning_type", "tuning.kind", ours, "" if ours == kind else f"{kind} there")
        ignore_lora(c, f"finetuning_type is {kind}")
    if kind in ("lora", "oft"):
        _adapter(c, kind, bits)
    if kind == "freeze":
        _freeze(c)
    elif kind == "full":
        for key in ("quantization_bit", "adapter_name_or_path"):
            c.ignored(key, "refused together with finetuning_type full")


def _adapter(c: Conversion, kind: str, bits: Any) -> None:
    if bits in (4, 8) and str(c.get("quantization_method", "bnb")).lower() in (
        "bnb",
        "bitsandbytes",
    ):
        c.same("quantization_method", "as here")
        c.carry("quantization_bit", "tuning.quant_type" if bits == 8 else "tuning.kind",
                "int8" if bits == 8 else "qlora")  # fmt: skip
        c.put("tuning.kind", "qlora")
        if c.get("quantization_type"):
            c.carry("quantization_type", "tuning.quant_type")
        if c.get("double_quantization") is not None:
            c.carry("double_quantization", "tuning.double_quant")
        if kind == "lora":
            c.changed("finetuning_type", "quantized, so qlora", "tuning.kind")
    elif kind == "lora":
        c.carry("finetuning_type", "tuning.kind", "lora")
        c.fill("tuning.kind", "lora", "default of LLaMA-Factory")
    if c.get("adapter_name_or_path") and number(c.get("create_new_adapter")) is not True:
        adapters = words(c.get("adapter_name_or_path"))
        how = "" if len(adapters) == 1 else "only the last; merge the others first with yrun merge"
        c.carry("adapter_name_or_path", "tuning.adapter", c.model(adapters[-1]), how)
        for key in (
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "lora_target",
            "use_dora",
            "use_rslora",
        ):
            c.ignored(key, "the adapter has its own")
        return
    rank, alpha = number(c.get("lora_rank", 8)), c.get("lora_alpha")
    convert_lora(c, rank="lora_rank", dropout=0.0)
    c.fill("tuning.rank", rank, "default of LLaMA-Factory")
    if alpha is None and is_number(rank):
        c.fill("tuning.alpha", 2 * rank, "LLaMA-Factory: twice the rank")
    targets(c, "lora_target")


def _freeze(c: Conversion) -> None:
    layers = number(c.get("freeze_trainable_layers", 2))
    total = _num_layers(c)
    if isinstance(layers, int) and layers > 0:
        share = round(min(layers / total, 1.0), 6) if total else FREEZE_SHARE
        how = f"{layers} of {total or 'all'} layers there"
        if not total:
            how += "; divide by the model's number of layers"
        if not c.carry("freeze_trainable_layers", "tuning.train_top", share, how):
            c.fill("tuning.train_top", share, how)
    else:
        c.without(
            "freeze_trainable_layers", "only the last layers can be trained: tuning.train_top"
        )


def _num_layers(c: Conversion) -> int | None:
    found = c.find(str(c.values.get("model.base", "")))
    config = found / "config.json" if found is not None else Path("missing")
    values = read_json(config) if config.is_file() else {}
    layers = values.get("num_hidden_layers") if isinstance(values, dict) else None
    return layers if isinstance(layers, int) else None


def _stage(c: Conversion) -> None:
    stage = c.get("stage", "sft")
    if not isinstance(stage, str) or stage not in STAGES:
        c.obstacles.append(f"stage: {stage} is not converted; see docs/guide")
        c.without("stage", "use pt, sft, rm, dpo, kto or ppo")
        return
    c.carry("stage", "train.stage", STAGES[stage])
    if stage == "rm":
        c.put("loss.kind", "bradley_terry")
    elif stage == "kto":
        c.put("loss.kind", "kto")
        _number(c, "pref_beta", "loss.beta")
        _number(c, "kto_chosen_weight", "loss.desirable_weight")
        _number(c, "kto_rejected_weight", "loss.undesirable_weight")
    elif stage == "dpo":
        _preference(c)
    elif stage == "ppo":
        _ppo(c)
    for key, kind in (("use_dft_loss", "dft"), ("use_eaft_loss", "eaft")):
        if number(c.get(key)) is True:
            c.carry(key, "loss.kind", kind)
    if c.values.get("loss.kind") == "eaft":
        _number(c, "eaft_alpha", "loss.alpha")


def _ppo(c: Conversion) -> None:
    """PPO as LLaMA-Factory runs it through TRL, with the defaults of both."""
    c.put("loss.kind", "ppo")
    c.put("loss.beta", 0.2, "where LLaMA-Factory starts; it adapts this to ppo_target")
    c.without("ppo_target", "the weight of the KL stays loss.beta")
    for key in ("ppo_score_norm", "ppo_whiten_rewards"):
        if number(c.get(key)) is False:
            c.same(key, "as here")
        else:
            c.without(key, "rewards count as they are; advantages are whitened by loss.whiten")
    c.without("ppo_buffer_size", "raise train.gradient_accumulation_steps instead")
    c.put("rollout.generations", 1, "an answer to each prompt")
    c.put("rollout.truncated", "keep", "LLaMA-Factory learns from answers that are cut off")
    for key, place, value in (
        ("ppo_epochs", "rollout.updates_per_rollout", 4),
        ("max_new_tokens", "rollout.max_new_tokens", 1024),
        ("temperature", "rollout.temperature", 0.95),
    ):
        c.carry(key, place, number(c.get(key)))
        c.fill(place, value, "default of LLaMA-Factory")
    for key in ("top_p", "top_k", "repetition_penalty"):
        c.without(key, "only the temperature may shape answers that are learned from")
    named = c.get("reward_model")
    if not isinstance(named, str) or c.get("reward_model_type", "lora") == "api":
        c.obstacles.append("stage: ppo needs a reward_model in a folder here")
        return
    reward = {"kind": "reward_model", "model": c.model(named)}
    how = "LLaMA-Factory's own form of it is not read: train one here with train.stage: reward"
    c.carry("reward_model", "rewards", [reward], how)
    c.same("reward_model_type", "found by its files")
    if c.find(named) is None and named not in c.missing:
        c.missing.append(named)


def _preference(c: Conversion) -> None:
    kind = str(c.get("pref_loss", "sigmoid"))
    if kind in ("orpo", "simpo"):
        c.carry("pref_loss", "loss.kind", kind)
    elif kind in ("sigmoid", "hinge", "ipo"):
        c.put("loss.kind", "dpo")
        c.carry("pref_loss", "loss.form", kind)
        if kind == "ipo":
            c.put("loss.length", "mean", "as LLaMA-Factory computes ipo")
    else:
        c.obstacles.append(f"pref_loss: {kind} has no counterpart here")
        c.without("pref_loss", "use sigmoid, hinge, ipo, orpo or simpo")
    if not _number(c, "pref_beta", "loss.beta"):
        c.fill("loss.beta", 0.1, "default of LLaMA-Factory")
    if kind == "simpo" and not _number(c, "simpo_gamma", "loss.gamma"):
        c.fill("loss.gamma", 0.5, "default of LLaMA-Factory")
    if number(c.get("pref_ftx")) and kind != "orpo":
        _number(c, "pref_ftx", "loss.sft")
    if number(c.get("dpo_label_smoothing")) and kind == "sigmoid":
        _number(c, "dpo_label_smoothing", "loss.label_smoothing")
        c.put("loss.form", "conservative")


def _number(c: Conversion, key: str, place: str) -> bool:
    value = number(c.get(key))
    return isinstance(value, int | float) and c.carry(key, place, float(value))


def _lengths(c: Conversion) -> None:
    is_text = c.values.get("train.stage") == "cpt"
    c.carry("cutoff_len", "data.max_length", number(c.get("cutoff_len")))
    c.fill("data.max_length", 2048, "default of LLaMA-Factory")
    c.fill("data.too_long", "split" if is_text else "cut",
           f"LLaMA-Factory {'divides' if is_text else 'cuts'} longer texts")  # fmt: skip
    c.fill("data.invalid", "drop", "LLaMA-Factory leaves out unusable rows with a warning")
    packing = number(c.get("packing")) is True or number(c.get("neat_packing")) is True
    is_pair = c.values.get("train.stage") in ("preference", "reward", "rl")
    if is_pair:
        for key in ("packing", "neat_packing"):
            c.ignored(key, "answers are not packed") if number(c.get(key)) is True else None
    elif packing:
        key = "neat_packing" if number(c.get("neat_packing")) is True else "packing"
        how = "" if key == "neat_packing" else "examples of a pack never see each other here"
        c.carry(key, "data.packing", True, how)
        c.same("packing", "see neat_packing")
    elif is_text and c.left.get("packing") is not False:
        c.fill("data.packing", True, "LLaMA-Factory packs in stage pt")
    if number(c.get("train_on_prompt")) is True and not is_pair:
        c.carry("train_on_prompt", "data.targets", "all")
    if number(c.get("mask_history")) is True:
        c.carry("mask_history", "data.targets", "last_assistant")
    if number(c.get("disable_shuffling")) is True:
        c.carry("disable_shuffling", "train.order", "as_written")
    if c.get("default_system"):
        c.carry("default_system", "data.system")
    take_rows(c, "max_samples", number(c.get("max_samples")))
    share = number(c.get("val_size", 0))
    if share:
        count_or_share(c, "val_size", share)


def _template(c: Conversion) -> None:
    template(c, "template", c.get("template"))
    thinking = number(c.get("enable_thinking"))
    if isinstance(thinking, bool) and has_key("model", "template_args"):
        c.carry("enable_thinking", "model.template_args.enable_thinking", thinking)
    for key in ("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels",
                "video_fps", "video_maxlen", "freeze_vision_tower", "freeze_language_model",
                "freeze_multi_modal_projector", "media_dir"):  # fmt: skip
        if c.get(key) is not None:
            c.without(key, "only text is learned from")


def _datasets(c: Conversion, key: str, place: str) -> None:
    named = words(c.get(key, []))
    given = c.get(key)
    listed = given if isinstance(given, list) else [given]
    if not named or any(isinstance(item, dict) for item in listed):
        return
    folder = str(c.get("dataset_dir", "data"))
    info, path = _dataset_info(c, folder)
    value = c.left.pop(key)
    c.entries.append(Entry(key, value, Outcome.CARRIED, place, "by dataset_info.json"))
    for name in named:
        if name in info and isinstance(info[name], Mapping):
            add_source(c, place, _Dataset(c, name, info[name], path).convert())
        elif folder == "ONLINE":
            add_source(c, place, {"hub": name})
        else:
            c.missing.append(f"{name} of {folder}/dataset_info.json")
            add_source(c, place, {"file": f"{folder}/{name}.json"})
    if place == "data.train":
        c.changed("dataset_dir", "its entries are written out in data.train", "data.train")


def _dataset_info(c: Conversion, folder: str) -> tuple[Mapping[str, Any], Path]:
    found = c.find(f"{folder}/dataset_info.json")
    if found is None:
        return {}, Path(folder)
    info = read_json(found)
    return (info if isinstance(info, dict) else {}), found.parent


class _Dataset:
    """An entry of dataset_info.json on its way into one of `data.train`."""

    def __init__(self, c: Conversion, name: str, info: Mapping[str, Any], folder: Path) -> None:
        self.c, self.name, self.left, self.folder = c, name, dict(info), folder
        self.entry: dict[str, Any] = {}
        self.columns: dict[str, str] = {}

    def done(self, key: str, value: Any, outcome: Outcome, note: str = "") -> None:
        place = "data.train" if outcome in (Outcome.CARRIED, Outcome.CHANGED) else ""
        name = f"dataset_info.{self.name}.{key}"
        self.c.entries.append(Entry(name, value, outcome, place, note))
        self.left.pop(key, None)

    def convert(self) -> dict[str, Any]:
        self.read_place()
        kind = self.left.get("formatting", "alpaca")
        is_text = self.c.values.get("train.stage") == "cpt" and kind == "alpaca"
        self.entry["format"] = "text" if is_text else FORMATS.get(str(kind), "auto")
        if "formatting" in self.left:
            self.done("formatting", kind, Outcome.CARRIED)
        if "ranking" in self.left:
            self.done("ranking", self.left["ranking"], Outcome.CARRIED, "found by its columns")
        self.read_columns(is_text)
        self.read_tags()
        for key, value in list(self.left.items()):
            self.done(key, value, Outcome.WITHOUT, "change the rows instead")
        if self.columns:
            self.entry["columns"] = self.columns
        return self.entry

    def read_place(self) -> None:
        for key in (
            "hf_hub_url",
            "file_name",
            "ms_hub_url",
            "om_hub_url",
            "script_url",
            "cloud_file_name",
        ):
            value = self.left.get(key)
            if value is None:
                continue
            if self.entry:
                self.done(key, value, Outcome.IGNORED, "another source comes first")
            elif key == "hf_hub_url":
                self.entry["hub"] = value
                self.done(key, value, Outcome.CARRIED)
            elif key == "file_name":
                self.entry |= self.c.data(str(self.folder / value))
                self.done(key, value, Outcome.CARRIED)
            elif key in ("ms_hub_url", "om_hub_url"):
                self.entry["hub"] = value
                self.done(
                    key, value, Outcome.CHANGED, "the dataset of that name on Hugging Face's Hub"
                )
            else:
                self.c.missing.append(str(value))
                self.entry["file"] = str(value)
                self.done(key, value, Outcome.WITHOUT, "save its rows to a file")
        split, subset = self.left.get("split", "train"), self.left.get("subset")
        for key, value in (("split", split if split != "train" else None), ("subset", subset)):
            if value and "hub" in self.entry:
                self.entry["files"] = f"*{value}*"
                self.done(key, value, Outcome.CHANGED, "the files whose names have it")
        if self.left.get("num_samples"):
            self.entry["take"] = self.left["num_samples"]
            self.done("num_samples", self.entry["take"], Outcome.CARRIED)

    def read_columns(self, is_text: bool) -> None:
        columns = self.left.pop("columns", {})
        for key, value in columns.items() if isinstance(columns, dict) else ():
            if is_text and key == "prompt":
                name = "text"
            elif key == "messages":
                name = "conversations" if self.entry["format"] == "sharegpt" else "messages"
            elif key == "kto_tag":
                name = "label"
            else:
                name = ALPACA.get(str(key), str(key))
            where = f"columns.{key}"
            if key in MEDIA or (name == key and key not in (*OTHER_COLUMNS, "messages")):
                self.done(where, value, Outcome.WITHOUT, "only text is learned from")
                continue
            if name != value:
                self.columns[name] = value
            self.done(where, value, Outcome.CARRIED)

    def read_tags(self) -> None:
        tags = self.left.pop("tags", {})
        for key, value in tags.items() if isinstance(tags, dict) else ():
            if key in ("role_tag", "content_tag"):
                known = value in TURN_KEYS
            else:
                known = value in SAME_ROLES.get(TAGS.get(key, ""), ()) or value == "function_call"
            if known:
                self.done(f"tags.{key}", value, Outcome.CARRIED, "found by its name")
            else:
                self.done(
                    f"tags.{key}", value, Outcome.WITHOUT, f"rename it to {TAGS.get(key, 'role')}"
                )


def _version_1(c: Conversion) -> None:
    """Version 1 names a dataset file and keeps its methods in sections."""
    config = c.left.get("peft_config")
    name = config.get("name", "lora") if isinstance(config, dict) else "full"
    if isinstance(config, dict):
        kind = name if name in ("lora", "freeze") else "lora"
        c.put("tuning.kind", "qlora" if c.get("quant_config") else kind)
        for key, place in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
            if kind == "lora" and isinstance(config.get(key), int | float):
                c.put(f"tuning.{place}", config[key])
        c.changed("peft_config", "rank, alpha and dropout of LoRA; see tuning", "tuning.kind")
        if c.get("quant_config"):
            c.changed("quant_config", "tuning.kind qlora with its defaults", "tuning.kind")
    else:
        c.fill("tuning.kind", "full", "no peft_config")
    if c.get("train_dataset"):
        _version_1_sources(c, str(c.get("train_dataset")))
    if c.get("dist_config"):
        c.without("dist_config", "use distributed.deepspeed")


def _version_1_sources(c: Conversion, path: str) -> None:
    """The sources that a YAML file of version 1 names; or the path itself."""
    found = c.find(path)
    if found is None or found.suffix not in (".yaml", ".yml"):
        add_source(c, "data.train", c.data(path))
        c.record("train_dataset", Outcome.CARRIED, "data.train")
        return
    sources = read_keys(found)
    for name, source in sources.items():
        given = source if isinstance(source, dict) else {"path": source}
        entry = c.data(str(given.get("path", name)))
        if isinstance(given.get("size"), int):
            entry["take"] = given["size"]
        add_source(c, "data.train", entry)
        for key, value in given.items():
            known = key in ("path", "source", "size")
            note = "" if known else "the form is found by the columns"
            outcome = Outcome.CARRIED if known else Outcome.CHANGED
            where = f"dataset_info.{name}.{key}"
            c.entries.append(Entry(where, value, outcome, "data.train", note))
    c.record("train_dataset", Outcome.CARRIED, "data.train", "its sources are written out")
