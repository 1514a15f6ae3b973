"""ms-swift's settings: `swift sft|pt|rlhf`, its YAML or JSON."""

from typing import Any

from yrunner.commands.convert.conversion import Conversion, Outcome, decimal, has_key, number, words
from yrunner.commands.convert.data import add_source, count_or_share, template
from yrunner.commands.convert.generated import METHODS, convert_rewarded, convert_taught
from yrunner.commands.convert.leftovers import convert_leftovers
from yrunner.commands.convert.training_arguments import (
    Defaults,
    Names,
    convert_common,
    convert_lora,
    ignore_lora,
    targets,
)

NAMES = Names(base="model", attention="attn_impl")
PREFERENCES = ("dpo", "kto", "orpo", "simpo", "cpo")
SHAPE = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_dora",
    "use_rslora",
)
KINDS = ("tuner_type", "train_type", "sft_type")
TOO_LONG = {"delete": "drop", "left": "cut", "right": "cut", "raise": "refuse", "split": "split"}
OTHER_HUB = "of that name on Hugging Face's Hub; ms-swift takes it from ModelScope"
REWARDED = {"max_completion_length": 512, "temperature": 0.9, "beta": 0.04, "loss_type": "grpo"}
TAUGHT = {"beta": 0.5, "lmbda": 0.5, "length": 512, "temperature": 0.9}
UNMASKED = ("preference", "reward", "rl")
"""Stages that learn whole answers, one by one."""
BETAS = {"simpo": 2.0}
"""Of preference losses whose default is not 0.1."""


def convert_ms_swift(c: Conversion, command: str) -> None:
    """Convert what is left of ms-swift's settings; `command` is sft, pt or rlhf, if known."""
    kind = next((str(c.get(key)) for key in KINDS if c.get(key)), "lora")
    convert_common(c, NAMES, Defaults(
        batch=1, learning_rate=1e-5 if kind == "full" else 1e-4, scheduler="cosine",
        warmup_ratio=0.0, weight_decay=0.1, gradient_checkpointing=True,
    ))  # fmt: skip
    if c.get("model"):
        is_there = c.get("use_hf") or c.find(str(c.get("model"))) is not None
        c.carry("model", "model.base", c.model(c.get("model")), "" if is_there else OTHER_HUB)
    _tuning(c, kind)
    _stage(c, command)
    _datasets(c)
    _lengths(c)
    template(c, "template", c.get("template"))
    thinking = number(c.get("enable_thinking"))
    if isinstance(thinking, bool) and has_key("model", "template_args"):
        c.carry("enable_thinking", "model.template_args.enable_thinking", thinking)
    convert_leftovers(c)


def _tuning(c: Conversion, kind: str) -> None:
    bits = number(c.get("quant_bits"))
    quantized = bits in (4, 8) and str(c.get("quant_method", "bnb")) in ("bnb", "None")
    ours = "full" if kind == "full" else "qlora" if quantized else "lora"
    for key in KINDS:
        c.carry(key, "tuning.kind", ours, "" if kind in ("lora", "full") else f"{kind} there")
    if kind == "full":
        ignore_lora(c, "all weights are trained")
        for key in ("target_modules", "modules_to_save"):
            if c.get(key):
                c.ignored(key, "all weights are trained")
        return
    c.values.setdefault("tuning.kind", ours)
    if quantized:
        _quantized(c, bits)
    adapters = words(c.get("adapters", []))
    if adapters:
        how = "" if len(adapters) == 1 else "only the last"
        c.carry("adapters", "tuning.adapter", c.model(adapters[-1]), how)
        for key in SHAPE:
            if c.get(key) is not None:
                c.ignored(key, "the adapter has its own")
        return
    _new_adapter(c)


def _quantized(c: Conversion, bits: Any) -> None:
    c.same("quant_method", "as here")
    if bits == 8:
        c.carry("quant_bits", "tuning.quant_type", "int8")
        return
    c.same("quant_bits", "tuning.kind qlora says so")
    for key, place in (
        ("bnb_4bit_quant_type", "tuning.quant_type"),
        ("bnb_4bit_use_double_quant", "tuning.double_quant"),
    ):
        if c.get(key) is not None:
            c.carry(key, place, number(c.get(key)))


def _new_adapter(c: Conversion) -> None:
    convert_lora(c, rank="lora_rank", dropout=0.05)
    c.fill("tuning.rank", 8, "default of ms-swift")
    targets(c, "target_modules")
    if str(c.get("lora_bias", "none")) == "none":
        c.same("lora_bias", "none, as here")
    if c.get("init_weights") in (True, "true"):
        c.same("init_weights", "as here")


def _stage(c: Conversion, command: str) -> None:
    method = c.get("rlhf_type", "dpo" if command == "rlhf" else None)
    if command == "pt":
        c.put("train.stage", "cpt")
    elif method == "rm":
        c.carry("rlhf_type", "train.stage", "reward")
        c.put("loss.kind", "bradley_terry")
        if c.get("center_rewards_coefficient"):
            c.carry("center_rewards_coefficient", "loss.center")
    elif method in PREFERENCES:
        _preference(c, method)
    elif method == "grpo":
        _rewarded(c)
    elif method == "gkd":
        convert_taught(c, "teacher_model", TAUGHT)
        c.same("rlhf_type", "teacher says so")
    elif method:
        c.obstacles.append(f"rlhf_type {method} is not converted; see docs/guide")
        c.without("rlhf_type", "use dpo, kto, orpo, simpo, rm, grpo or gkd")
    if str(c.get("task_type", "causal_lm")) != "causal_lm":
        c.obstacles.append(f"task_type {c.get('task_type')} has no counterpart here")
    if number(c.get("enable_dft_loss")) is True:
        c.carry("enable_dft_loss", "loss.kind", "dft")


def _rewarded(c: Conversion) -> None:
    """GRPO, or RLOO as one of its estimators of advantages."""
    estimator = str(c.get("advantage_estimator", "grpo"))
    if estimator not in METHODS:
        c.obstacles.append(f"advantage_estimator {estimator} has no counterpart here")
    method = estimator if estimator in METHODS else "grpo"
    convert_rewarded(c, method, REWARDED)
    c.carry("rlhf_type", "loss.kind", method)
    c.carry("advantage_estimator", "loss.kind", method)


def _preference(c: Conversion, method: str) -> None:
    kind = "simpo" if method == "cpo" else method
    if method == "cpo":
        c.obstacles.append("rlhf_type cpo has no counterpart here")
    c.carry("rlhf_type", "loss.kind", kind)
    c.put("train.stage", "preference")
    c.put("loss.kind", kind)
    form = c.get("loss_type")
    if kind == "dpo" and form in ("sigmoid", "hinge", "ipo", "robust"):
        c.carry("loss_type", "loss.form", form)
        c.put("loss.length", "mean", "as TRL computes ipo") if form == "ipo" else None
    elif form == kind:
        c.same("loss_type", "loss.kind says so")
    elif form:
        c.obstacles.append(f"loss_type {form} has no counterpart here")
    c.fill("loss.beta", BETAS.get(kind, 0.1), "default of ms-swift") if c.get(
        "beta"
    ) is None else None
    for key, place, kinds in (
        ("beta", "beta", PREFERENCES),
        ("rpo_alpha", "sft", ("dpo",)),
        ("cpo_alpha", "sft", ("simpo",)),
        ("simpo_gamma", "gamma", ("simpo",)),
        ("desirable_weight", "desirable_weight", ("kto",)),
        ("undesirable_weight", "undesirable_weight", ("kto",)),
    ):
        if isinstance(number(c.get(key)), int | float) and kind in kinds:
            c.carry(key, f"loss.{place}", decimal(c.get(key)))


def _datasets(c: Conversion) -> None:
    for key, place in (("dataset", "data.train"), ("val_dataset", "data.validation")):
        given = c.get(key, [])
        named = given if isinstance(given, list) else [given] if isinstance(given, str) else []
        entries = [_entry(c, str(name)) for name in named]
        other = any("hub" in entry for entry in entries) and not c.get("use_hf")
        for entry in entries:
            add_source(c, place, entry)
        if entries:
            outcome = Outcome.CHANGED if other else Outcome.CARRIED
            c.record(key, outcome, place, OTHER_HUB if other else "")
    columns = c.get("columns")
    if isinstance(columns, dict):
        for entry in c.values.get("data.train", ()):
            entry["columns"] = {ours: theirs for theirs, ours in columns.items()}
        c.record("columns", Outcome.CARRIED, "data.train")
    share = number(c.get("split_dataset_ratio", 0))
    if share and c.values.get("data.validation"):
        c.ignored("split_dataset_ratio", "val_dataset counts instead")
    else:
        count_or_share(c, "split_dataset_ratio", share)
    _rows(c)


def _rows(c: Conversion) -> None:
    for key in ("dataset_shuffle", "train_dataloader_shuffle"):
        if number(c.get(key)) is False:
            c.carry(key, "train.order", "as_written")
        else:
            c.same(key, "as here")
    if "strict" in c.left:
        c.carry("strict", "data.invalid", "refuse" if number(c.get("strict")) is True else "drop")
    c.fill("data.invalid", "drop", "ms-swift leaves out unusable rows")
    for key in ("model_author", "model_name"):
        if c.get(key):
            c.without(key, "write the name into the rows of swift/self-cognition")


def _entry(c: Conversion, name: str) -> dict[str, Any]:
    """`path:subset#number` of rows."""
    name, _, number_of_rows = name.partition("#")
    path, _, subset = name.partition(":") if c.find(name) is None else (name, "", "")
    entry = c.data(path)
    if subset and "hub" in entry:
        entry["files"] = f"*{subset}*"
    if number_of_rows.isdigit():
        entry["take"] = int(number_of_rows)
    return entry


def _lengths(c: Conversion) -> None:
    if isinstance(number(c.get("max_length")), int):
        c.carry("max_length", "data.max_length", number(c.get("max_length")))
    c.fill("data.max_length", 2048, "none in ms-swift: the most that the model can take")
    strategy = str(c.get("truncation_strategy", "delete"))
    how = "cut at the end here" if strategy == "left" else ""
    if not c.carry("truncation_strategy", "data.too_long", TOO_LONG.get(strategy, "drop"), how):
        c.fill("data.too_long", "drop", "ms-swift leaves out longer rows")
    if number(c.get("packing")) is True and c.values.get("train.stage") not in UNMASKED:
        c.carry("packing", "data.packing", True)
    scale = str(c.get("loss_scale", "default"))
    ours = {"default": "assistant", "last_round": "last_assistant", "all": "all"}.get(scale)
    if c.get("loss_scale") and ours and c.values.get("train.stage") not in UNMASKED:
        c.carry("loss_scale", "data.targets", ours)
    if c.get("system"):
        path = c.find(str(c.get("system"))) if str(c.get("system")).endswith(".txt") else None
        text = path.read_text("utf-8").strip() if path else str(c.get("system"))
        c.carry("system", "data.system", text, "the text of the file" if path else "")
