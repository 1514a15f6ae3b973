"""TRL's settings: arguments of `trl sft|dpo|grpo|...`, of its scripts, or its YAML."""

from typing import Any

from yrunner.commands.convert.conversion import (
    Conversion,
    Entry,
    Outcome,
    decimal,
    is_number,
    number,
    words,
)
from yrunner.commands.convert.data import add_source, template
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

NAMES = Names(rank="lora_r")
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4, "orpo": 1e-6, "cpo": 1e-6,
         "grpo": 1e-6, "rloo": 1e-6, "gkd": 2e-5}  # fmt: skip
"""TRL's default learning rate of each trainer."""
STAGES = {"sft": "sft", "reward": "reward", "dpo": "preference", "kto": "preference",
          "orpo": "preference", "cpo": "preference"}  # fmt: skip
REWARDED: dict[str, dict[str, Any]] = {
    "grpo": {"max_completion_length": 512, "beta": 0.0, "loss_type": "dapo"},
    "rloo": {"max_completion_length": 512, "num_generations": 2},
}
"""TRL's defaults that differ here."""
TAUGHT = {"beta": 0.5, "lmbda": 0.5, "length": 128, "temperature": 0.9}
DPO_FORMS = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "robust": "robust",
             "sigmoid_norm": "sigmoid"}  # fmt: skip
PEFT_TARGETS = ["q_proj", "v_proj"]
BY_NAME = "the files whose names have it"


def convert_trl(c: Conversion, command: str) -> None:
    """Convert what is left of TRL's settings; `command` is the trainer, if a command names it."""
    command = {"reward_modeling": "reward"}.get(command, command) or _trainer_of(c)
    rate = RATES.get(command, 2e-5)
    validates = str(c.get("eval_strategy", "no")) not in ("no", "False")
    convert_common(c, NAMES, Defaults(learning_rate=rate, gradient_checkpointing=True))
    if c.get("model_name_or_path"):
        c.carry("model_name_or_path", "model.base", c.model(c.get("model_name_or_path")))
    _tuning(c)
    if command in METHODS:
        convert_rewarded(c, command, REWARDED[command])
    elif command == "gkd":
        convert_taught(c, "teacher_model_name_or_path", TAUGHT)
    else:
        _stage(c, command)
    _datasets(c, validates=validates)
    _lengths(c)
    template(c, "chat_template_path", c.get("chat_template_path"))
    c.without("env", "set it in front of yrun")
    convert_leftovers(c)


def _trainer_of(c: Conversion) -> str:
    """The trainer whose keys a YAML file has; `trl` itself is told by its command."""
    if c.get("reward_funcs") is not None or c.get("num_generations") is not None:
        return "grpo"
    if c.get("teacher_model_name_or_path") is not None:
        return "gkd"
    if c.get("desirable_weight") is not None or c.get("undesirable_weight") is not None:
        return "kto"
    if c.get("center_rewards_coefficient") is not None:
        return "reward"
    return "dpo" if c.get("beta") is not None else "sft"


def _tuning(c: Conversion) -> None:
    four, eight = number(c.get("load_in_4bit")) is True, number(c.get("load_in_8bit")) is True
    if number(c.get("use_peft")) is not True:
        c.same("use_peft", "false: all weights are trained")
        c.fill("tuning.kind", "full", "without use_peft TRL trains all weights")
        ignore_lora(c, "use_peft is off")
        for key in ("load_in_4bit", "load_in_8bit"):
            if number(c.get(key)) is True:
                c.ignored(key, "use_peft is off, and quantized weights cannot be trained")
        return
    kind = "qlora" if four or eight else "lora"
    c.carry("use_peft", "tuning.kind", kind)
    if eight:
        c.carry("load_in_8bit", "tuning.quant_type", "int8")
    elif four:
        c.same("load_in_4bit", "tuning.kind qlora says so")
        if c.get("bnb_4bit_quant_type"):
            c.carry("bnb_4bit_quant_type", "tuning.quant_type")
        if c.get("use_bnb_nested_quant") is not None:
            c.carry(
                "use_bnb_nested_quant", "tuning.double_quant", number(c.get("use_bnb_nested_quant"))
            )
        c.fill("tuning.double_quant", False, "default of TRL")
    convert_lora(c, rank="lora_r", dropout=0.05)
    targets(c, "lora_target_modules")
    c.fill("tuning.targets", PEFT_TARGETS, "default of TRL, by PEFT, for most models")


def _stage(c: Conversion, command: str) -> None:
    if command not in STAGES:
        c.obstacles.append(f"trl {command} is not converted; see docs/guide/rl.md")
        return
    c.put("train.stage", STAGES[command])
    if command == "reward":
        c.put("loss.kind", "bradley_terry")
        if c.get("center_rewards_coefficient"):
            c.carry("center_rewards_coefficient", "loss.center")
    elif command == "sft":
        _sft_loss(c)
    elif command in ("kto", "orpo"):
        c.put("loss.kind", command)
        if c.get("loss_type") == command:
            c.same("loss_type", "loss.kind says so")
        for key in ("beta", "desirable_weight", "undesirable_weight"):
            if c.get(key) is not None and (key == "beta" or command == "kto"):
                c.carry(key, f"loss.{key}", decimal(c.get(key)))
    elif command == "cpo":
        _cpo_loss(c)
    else:
        _dpo_loss(c)


def _sft_loss(c: Conversion) -> None:
    kind = c.get("loss_type")
    if kind == "dft":
        c.carry("loss_type", "loss.kind", "dft")
    elif kind in ("nll", "chunked_nll"):
        c.same("loss_type", "plain cross-entropy, as here")


def _cpo_loss(c: Conversion) -> None:
    if c.get("loss_type") != "simpo":
        c.obstacles.append(
            f"loss_type {c.get('loss_type', 'sigmoid')} of trl cpo has no counterpart here"
        )
        return
    c.carry("loss_type", "loss.kind", "simpo")
    c.fill("loss.beta", 0.1, "default of TRL")
    c.fill("loss.gamma", 0.5, "default of TRL")
    c.fill("loss.sft", 1.0, "default of TRL")
    for key, place in (("beta", "beta"), ("simpo_gamma", "gamma"), ("cpo_alpha", "sft")):
        if c.get(key) is not None:
            c.carry(key, f"loss.{place}", decimal(c.get(key)))


def _dpo_loss(c: Conversion) -> None:
    c.put("loss.kind", "dpo")
    named = words(c.get("loss_type", ["sigmoid"]))
    weights = [decimal(value) for value in _list(c.get("loss_weights", [1.0] * len(named)))]
    forms = [word for word in named if word != "sft"]
    weighted = len(weights) == len(named) and all(map(is_number, weights))
    if len(forms) != 1 or forms[0] not in DPO_FORMS or not weighted:
        c.obstacles.append(f"loss_type {', '.join(named)} has no counterpart here")
        c.without("loss_type", "use sigmoid, hinge, ipo or robust, with sft beside it")
        return
    c.carry("loss_type", "loss.form", DPO_FORMS[forms[0]])
    if forms[0] in ("ipo", "sigmoid_norm"):
        c.put("loss.length", "mean", f"as TRL computes {forms[0]}")
    if "sft" in named:
        share = weights[named.index("sft")] / (weights[named.index(forms[0])] or 1.0)
        if not c.carry("loss_weights", "loss.sft", share, "relative to the other loss"):
            c.put("loss.sft", share, "loss_type sft")
    if number(c.get("label_smoothing")):
        c.carry("label_smoothing", "loss.label_smoothing", decimal(c.get("label_smoothing")))
        if forms[0] == "sigmoid":
            c.put("loss.form", "conservative", "sigmoid with label_smoothing")
    if c.get("beta") is not None:
        c.carry("beta", "loss.beta", decimal(c.get("beta")))
    for key in ("ref_model", "precompute_ref_log_probs", "precompute_ref_batch_size"):
        if c.get(key):
            c.without(key, "the reference is the model as the run began, scored once where needed")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else words(value)


def _datasets(c: Conversion, *, validates: bool) -> None:
    if c.get("dataset_name"):
        entry = c.data(str(c.get("dataset_name")))
        c.carry("dataset_name", "data.train", [entry])
        _part(c, entry)
        tested = c.get("dataset_test_split")
        if tested and "hub" in entry:
            validation = [{"hub": entry["hub"], "files": f"*{tested}*"}]
            c.carry("dataset_test_split", "data.validation", validation, BY_NAME)
        elif validates and "hub" in entry:
            c.fill("data.validation", [{"hub": entry["hub"], "files": "*test*"}], "default of TRL")
        elif tested:
            c.ignored("dataset_test_split", "nothing is validated")
    elif isinstance(c.get("datasets"), list):
        _mixture(c)


def _part(c: Conversion, entry: dict[str, Any]) -> None:
    config, split = c.get("dataset_config"), str(c.get("dataset_train_split", "train"))
    parts = [part for part in (config, split if split != "train" else None) if part]
    if parts and "hub" in entry:
        entry["files"] = f"*{'*'.join(map(str, parts))}*"
    if split == "train":
        c.same("dataset_train_split", "the default")
    for key in ("dataset_config", "dataset_train_split"):
        if c.get(key):
            c.changed(key, BY_NAME, "data.train")
    column = c.get("dataset_text_field")
    if column and column != "text":
        entry |= {"format": "text", "columns": {"text": str(column)}}
        c.carry("dataset_text_field", "train.stage", "cpt", "plain text")
    else:
        c.same("dataset_text_field", "text, found by its name")


def _mixture(c: Conversion) -> None:
    for index, source in enumerate(c.left.pop("datasets")):
        given = source if isinstance(source, dict) else {"path": source}
        entry = c.data(str(given.get("path", "")))
        add_source(c, "data.train", entry)
        for key, value in given.items():
            outcome = Outcome.CARRIED if key == "path" else Outcome.WITHOUT
            note = "" if key == "path" else "see data.train.files and columns"
            c.entries.append(Entry(f"datasets[{index}].{key}", value, outcome, "data.train", note))


def _lengths(c: Conversion) -> None:
    for key in ("max_length", "max_seq_length"):
        if isinstance(number(c.get(key)), int):
            c.carry(key, "data.max_length", number(c.get(key)))
    c.fill("data.max_length", 1024, "default of TRL")
    c.fill("data.too_long", "cut", "TRL cuts longer rows")
    if c.get("truncation_mode") == "keep_start":
        c.same("truncation_mode", "cut at the end, as here")
    if str(c.get("train_sampling_strategy", "")) == "sequential":
        c.carry("train_sampling_strategy", "train.order", "as_written")
    if c.get("shuffle_dataset") is not None:
        c.changed("shuffle_dataset", "see train.order: a new order in each epoch")
    _learned_tokens(c)


def _learned_tokens(c: Conversion) -> None:
    is_sft = c.values.get("train.stage") in ("sft", "cpt")
    if number(c.get("packing")) is True and is_sft:
        c.carry("packing", "data.packing", True, "examples of a pack never see each other here")
    if number(c.get("assistant_only_loss")) is True:
        c.carry("assistant_only_loss", "data.targets", "assistant")
    elif "assistant_only_loss" in c.left and is_sft:
        c.carry("assistant_only_loss", "data.targets", "all")
    elif is_sft:
        c.fill("data.targets", "assistant", "TRL learns all tokens of `messages`; for that, all")
    completion = number(c.get("completion_only_loss"))
    if completion is False:
        c.carry("completion_only_loss", "data.targets", "all")
    elif completion is True:
        c.same("completion_only_loss", "only the answer is learned, as here")
