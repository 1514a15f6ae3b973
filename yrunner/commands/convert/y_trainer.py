"""Y-Trainer's command line, and that of its sorting."""

from yrunner.commands.convert.conversion import Conversion, Outcome, has_key, number, words
from yrunner.commands.convert.data import add_source
from yrunner.commands.convert.leftovers import remedy

SYSTEM = "You are a helpful assistant."
LORA_TARGETS = ["q_proj", "v_proj", "k_proj", "o_proj"]
SCORES = {
    "similarity_rank": "similarity",
    "loss_rank": "loss",
    "ppl_rank": "perplexity",
    "entropy_rank": "entropy",
}


def convert_y_trainer(c: Conversion, command: str) -> None:
    """Convert what is left of Y-Trainer's arguments."""
    if command == "sort":
        _sorting(c)
        c.rest(remedy)
        return
    gpus = c.values.get("distributed.processes", 1)
    sharded = number(c.get("use_deepspeed")) is True
    if c.get("model_path_to_load"):
        c.carry("model_path_to_load", "model.base", c.model(c.get("model_path_to_load")))
    if c.get("data_type"):
        c.carry("data_type", "model.dtype")
    c.fill("model.dtype", "bfloat16", "default of Y-Trainer")
    _tuning(c)
    _stage(c, gpus if isinstance(gpus, int) else 1)
    _data(c)
    _training(c, sharded)
    _rest(c)


def _tuning(c: Conversion) -> None:
    if number(c.get("use_lora")) is not True:
        c.same("use_lora", "false: all weights are trained")
        c.fill("tuning.kind", "full", "without use_lora Y-Trainer trains all weights")
        for key in ("lora_target_modules", "lora_rank", "lora_alpha", "lora_dropout", "lora_path"):
            c.ignored(key, "use_lora is not 'true'")
        return
    c.carry("use_lora", "tuning.kind", "lora")
    if c.get("lora_path"):
        c.carry("lora_path", "tuning.adapter", c.model(c.get("lora_path")))
        for key in ("lora_target_modules", "lora_rank", "lora_alpha", "lora_dropout"):
            c.ignored(key, "the adapter of lora_path has its own")
        return
    if c.get("lora_target_modules"):
        c.carry("lora_target_modules", "tuning.targets", words(c.get("lora_target_modules")))
    c.fill("tuning.targets", LORA_TARGETS, "default of Y-Trainer")
    for key, place in (("lora_rank", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if isinstance(number(c.get(key)), int | float):
            c.carry(key, f"tuning.{place}", number(c.get(key)))
    c.fill("tuning.dropout", 0.2, "default of Y-Trainer")


def _stage(c: Conversion, gpus: int) -> None:
    stage = str(c.get("training_type", "sft"))
    c.carry("training_type", "train.stage", stage)
    if number(c.get("use_NLIRG")) is True:
        c.carry("use_NLIRG", "loss.kind", "nlirg")
    else:
        c.same("use_NLIRG", "off: plain cross-entropy")
    tokens = number(c.get("token_batch", -1))
    if stage != "sft":
        c.ignored("token_batch", f"training_type is {stage}")
    elif isinstance(tokens, int) and tokens > 0:
        each = -(-tokens // gpus)
        how = "" if gpus == 1 else f"{tokens} divided by {gpus} GPUs, as Y-Trainer does"
        c.carry("token_batch", "train.token_batch", each, how)
    else:
        c.same("token_batch", "off, as here")
    for key in ("Distillition", "teacher_model_path", "coefficient_of_origin_loss"):
        if c.get("Distillition") is True or key not in c.left:
            continue
        c.ignored(key, "Distillition is not given")
    if c.get("Distillition") is True:
        c.obstacles.append("Distillition is not converted; see docs/guide/distill.md")


def _data(c: Conversion) -> None:
    paths = words(c.get("data_path", ""))
    if paths:
        for path in paths:
            add_source(c, "data.train", c.data(path))
        c.record("data_path", Outcome.CARRIED, "data.train")
    is_text = c.values.get("train.stage") == "cpt"
    c.fill("train.order", "as_written", "Y-Trainer never shuffles")
    if is_text:
        _text(c)
        return
    c.ignored("pack_length", "training_type is sft")
    if not c.carry("system_prompt", "data.system"):
        c.fill("data.system", SYSTEM, "default of Y-Trainer")
    c.carry("max_seq_len", "data.max_length", number(c.get("max_seq_len")))
    c.fill("data.max_length", 20520, "default of Y-Trainer")
    c.fill("data.too_long", "drop", "Y-Trainer leaves out longer rows")
    thinks = "qwen3" in str(c.values.get("model.base")).lower()
    if thinks and has_key("model", "template_args"):
        c.fill("model.template_args.enable_thinking", False, "Y-Trainer switches thinking off")


def _text(c: Conversion) -> None:
    for key in ("system_prompt", "max_seq_len"):
        c.ignored(key, "training_type is cpt")
    for entry in c.values.get("data.train", ()):
        entry["format"] = "text"
    length = number(c.get("pack_length", -1))
    if isinstance(length, int) and length > 1:
        c.carry("pack_length", "data.max_length", length, "with data.packing")
        c.put("data.packing", True)
    else:
        c.same("pack_length", "off, as here")
    c.fill("data.too_long", "split", "Y-Trainer divides longer texts")


def _training(c: Conversion, sharded: bool) -> None:
    for key, place, value in (
        ("epoch", "train.epochs", 3),
        ("batch_size", "train.batch_size", 1),
        ("lr", "train.learning_rate", 5e-6),
    ):
        if not c.carry(key, place, number(c.get(key))):
            c.fill(place, value, "default of Y-Trainer")
    if sharded:
        _sharded(c)
    else:
        c.same("use_deepspeed", "off, as here")
        c.ignored("gradient_accumulation_steps", "only DeepSpeed uses it")
        c.ignored("deepspeed_cfg_path", "use_deepspeed is not 'true'")
        c.fill("train.lr_scheduler", "constant", "Y-Trainer on one GPU")
        c.fill("train.warmup_ratio", 0.0, "Y-Trainer on one GPU")
    c.fill("train.weight_decay", 0.01, "default of its AdamW")
    c.fill("train.max_grad_norm", 0.0, "Y-Trainer does not clip gradients")
    if number(c.get("enable_gradit_checkpoing")) is True:
        c.carry("enable_gradit_checkpoing", "train.gradient_checkpointing", True)
    epochs = words(c.get("checkpoint_epoch", ""))
    if epochs:
        how = "after every epoch here; no checkpoint of another is kept"
        c.carry("checkpoint_epoch", "train.checkpoint.every", "epoch", how)
        c.put("train.checkpoint.keep", max(2, len(epochs)))
    c.fill("train.result", "last", "Y-Trainer keeps the last")


def _sharded(c: Conversion) -> None:
    path = c.get("deepspeed_cfg_path")
    if path and c.find(str(path)):
        found = c.find(str(path))
        assert found is not None
        c.carry("deepspeed_cfg_path", "distributed.deepspeed.config", c.written(found))
        c.same("use_deepspeed", "distributed.deepspeed says so")
    else:
        c.carry("use_deepspeed", "distributed.deepspeed.stage", 3)
        c.without(
            "deepspeed_cfg_path", "its file is not here; ZeRO 3 as without it"
        ) if path else None
        c.fill("train.lr_scheduler", "linear", "Y-Trainer with DeepSpeed")
        c.fill("train.warmup_ratio", 0.01, "Y-Trainer with DeepSpeed")
    steps = number(c.get("gradient_accumulation_steps"))
    if isinstance(steps, int):
        c.carry("gradient_accumulation_steps", "train.gradient_accumulation_steps", steps)


def _rest(c: Conversion) -> None:
    if isinstance(number(c.get("seed")), int):
        c.carry("seed", "seed", number(c.get("seed")))
    if c.get("output_dir"):
        c.carry("output_dir", "output", str(c.get("output_dir")))
    if number(c.get("use_tensorboard")) is True:
        c.carry("use_tensorboard", "train.trackers", ["tensorboard"])
    if c.get("tensorboard_path"):
        c.without("tensorboard_path", "not needed: in the run folder")
    for key, note in (
        ("save_optimizer_state", "not needed: checkpoints hold all that --resume needs"),
        ("use_process_bar", "not needed: progress is always shown"),
        ("local_rank", "not needed: yrun train starts its processes"),
    ):
        c.without(key, note)
    c.rest(remedy)


def _sorting(c: Conversion) -> None:
    """`python -m training_code.utils.schedule.sort`."""
    if c.get("model_path"):
        c.carry("model_path", "model.base", c.model(c.get("model_path")))
    for path in words(c.get("data_path", "")):
        add_source(c, "data.train", c.data(path))
    c.record("data_path", Outcome.CARRIED, "data.train")
    c.changed("output_path", "yrun sort writes the rows into the run folder")
    mode = str(c.get("mode", ""))
    if mode in SCORES:
        c.carry("mode", "sort.score", SCORES[mode])
        c.put("sort.order", "ascending")
