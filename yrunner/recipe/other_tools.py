"""Keys of other tools' recipes, and where the same is set here."""

from collections.abc import Collection

LORA = {
    "lora_r": "tuning.rank",
    "lora_rank": "tuning.rank",
    "lora_alpha": "tuning.alpha",
    "lora_dropout": "tuning.dropout",
    "lora_target": "tuning.targets",
    "lora_target_modules": "tuning.targets",
    "target_modules": "tuning.targets",
    "use_dora": "tuning.variant",
    "use_rslora": "tuning.variant",
    "lora_modules_to_save": "tuning.modules_to_save",
    "loraplus_lr_ratio": "tuning.lora_plus_ratio",
    "load_in_4bit": "tuning.kind",
    "load_in_8bit": "tuning.kind",
}
TRAINER = {
    "model_name_or_path": "model.base",
    "teacher_model_name_or_path": "teacher.model",
    "lmbda": "teacher.on_policy",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_steps": "train.warmup_ratio",
    "optim": "train.optimizer",
    "logging_steps": "train.log_every",
    "save_steps": "train.checkpoint.every",
    "save_strategy": "train.checkpoint.every",
    "save_total_limit": "train.checkpoint.keep",
    "eval_steps": "train.validate_every",
    "eval_strategy": "train.validate_every",
    "report_to": "train.trackers",
    "output_dir": "output",
    "deepspeed": "distributed.deepspeed.config",
    "resume_from_checkpoint": "the option --resume of yrun train",
    "overwrite_output_dir": "the option --overwrite of yrun train",
    "do_train": "the command yrun train",
    "do_eval": "the command yrun eval",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "dataloader_num_workers": "not needed",
    "ddp_timeout": "not needed",
}
"""Arguments of transformers, which most tools pass on."""
LLAMA_FACTORY = {
    **TRAINER,
    **{key: LORA[key] for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")},
    **{key: LORA[key] for key in ("use_dora", "use_rslora", "loraplus_lr_ratio")},
    "additional_target": "tuning.modules_to_save",
    "template": "model.chat_template",
    "enable_thinking": "model.template_args",
    "flash_attn": "model.attention",
    "infer_dtype": "model.dtype",
    "finetuning_type": "tuning.kind",
    "quantization_bit": "tuning.kind",
    "quantization_type": "tuning.quant_type",
    "double_quantization": "tuning.double_quant",
    "freeze_trainable_layers": "tuning.train_top",
    "adapter_name_or_path": "tuning.adapter",
    "dataset": "data.train",
    "dataset_dir": "data.train",
    "eval_dataset": "data.validation",
    "val_size": "data.validation_share",
    "max_samples": "data.train.take",
    "default_system": "data.system",
    "cutoff_len": "data.max_length",
    "packing": "data.packing",
    "neat_packing": "data.packing",
    "train_on_prompt": "data.targets",
    "mask_history": "data.targets",
    "use_dft_loss": "loss.kind",
    "use_eaft_loss": "loss.kind",
    "pref_loss": "loss.kind",
    "pref_beta": "loss.beta",
    "pref_ftx": "loss.sft",
    "dpo_label_smoothing": "loss.label_smoothing",
    "simpo_gamma": "loss.gamma",
    "kto_chosen_weight": "loss.desirable_weight",
    "kto_rejected_weight": "loss.undesirable_weight",
    "disable_shuffling": "train.order",
    "export_dir": "the command yrun merge",
    "plot_loss": "not needed, report.html has the plots",
    "overwrite_cache": "not needed",
    "preprocessing_num_workers": "not needed",
}
AXOLOTL = {
    **{key: place for key, place in LORA.items() if key not in ("lora_rank", "lora_target")},
    **{key: TRAINER[key] for key in ("bf16", "fp16", "warmup_steps", "logging_steps", "deepspeed")},
    **{key: TRAINER[key] for key in ("save_steps", "save_total_limit", "output_dir")},
    "base_model": "model.base",
    "tokenizer_config": "model.base",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "sdp_attention": "model.attention",
    "chat_template_jinja": "model.chat_template",
    "adapter": "tuning.kind",
    "lora_model_dir": "tuning.adapter",
    "lora_target_linear": "tuning.targets",
    "peft_use_dora": "tuning.variant",
    "peft_use_rslora": "tuning.variant",
    "unfrozen_parameters": "tuning.train_top",
    "datasets": "data.train",
    "pretraining_dataset": "data.train",
    "test_datasets": "data.validation",
    "val_set_size": "data.validation_share",
    "default_system_message": "data.system",
    "sequence_len": "data.max_length",
    "excess_length_strategy": "data.too_long",
    "sample_packing": "data.packing",
    "pad_to_sequence_len": "not needed",
    "train_on_inputs": "data.targets",
    "roles_to_train": "data.targets",
    "num_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size",
    "eval_batch_size": "eval.batch_size",
    "saves_per_epoch": "train.checkpoint.every",
    "evals_per_epoch": "train.checkpoint.every",
    "early_stopping_patience": "train.early_stopping.patience",
    "wandb_project": "train.trackers",
    "use_eaft": "loss.kind",
    "rl": "loss.kind",
    "rl_beta": "loss.beta",
    "orpo_alpha": "loss.beta",
    "rpo_alpha": "loss.sft",
    "kto_desirable_weight": "loss.desirable_weight",
    "kto_undesirable_weight": "loss.undesirable_weight",
    "curriculum_sampling": "train.order",
    "dataset_prepared_path": "not needed",
    "hub_model_id": "merge.push",
}
TRL = {
    **TRAINER,
    **{key: LORA[key] for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")},
    **{key: LORA[key] for key in ("use_dora", "use_rslora", "load_in_4bit", "load_in_8bit")},
    "attn_implementation": "model.attention",
    "chat_template_path": "model.chat_template",
    "chat_template_kwargs": "model.template_args",
    "use_peft": "tuning.kind",
    "bnb_4bit_quant_type": "tuning.quant_type",
    "use_bnb_nested_quant": "tuning.double_quant",
    "dataset_name": "data.train",
    "dataset_train_split": "data.train.files",
    "dataset_test_split": "data.validation",
    "dataset_text_field": "data.train.columns",
    "max_seq_length": "data.max_length",
    "assistant_only_loss": "data.targets",
    "completion_only_loss": "data.targets",
    "loss_type": "loss.kind",
    "num_generations": "rollout.generations",
    "max_completion_length": "rollout.max_new_tokens",
    "num_iterations": "rollout.updates_per_rollout",
    "mask_truncated_completions": "rollout.truncated",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "scale_rewards": "loss.scale",
    "importance_sampling_level": "loss.ratio",
    "reward_weights": "rewards",
    "push_to_hub": "merge.push",
    "hub_model_id": "merge.push",
}
MS_SWIFT = {
    **TRAINER,
    "lorap_lr_ratio": "tuning.lora_plus_ratio",
    **{key: LORA[key] for key in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")},
    "attn_impl": "model.attention",
    "model_type": "model.base",
    "train_type": "tuning.kind",
    "tuner_type": "tuning.kind",
    "sft_type": "tuning.kind",
    "quant_bits": "tuning.kind",
    "adapters": "tuning.adapter",
    "dataset": "data.train",
    "val_dataset": "data.validation",
    "split_dataset_ratio": "data.validation_share",
    "rlhf_type": "loss.kind",
    "center_rewards_coefficient": "loss.center",
    "truncation_strategy": "data.too_long",
}
Y_TRAINER = {
    "model_path_to_load": "model.base",
    "data_type": "model.dtype",
    "use_lora": "tuning.kind",
    "lora_path": "tuning.adapter",
    "data_path": "data.train",
    "system_prompt": "data.system",
    "max_seq_len": "data.max_length",
    "pack_length": "data.packing",
    "training_type": "train.stage",
    "epoch": "train.epochs",
    "lr": "train.learning_rate",
    "checkpoint_epoch": "train.checkpoint.every",
    "use_nlirg": "loss.kind",
    "use_deepspeed": "distributed.deepspeed",
}
TOOLS = {
    "LLaMA-Factory": LLAMA_FACTORY,
    "Axolotl": AXOLOTL,
    "TRL": TRL,
    "ms-swift": MS_SWIFT,
    "Y-Trainer": Y_TRAINER,
}
"""Of keys with several owners the first is named. Without keys that have the same name here."""
MISSING = {
    "ref_model": "the reference is the model as the run began; remove it",
    "ref_adapters": "the reference is the model as the run began; remove it",
    "precompute_ref_log_probs": "answers are scored once wherever that is needed; remove it",
    "fsdp": "use distributed.deepspeed",
    "fsdp_config": "use distributed.deepspeed",
    "tensor_parallel_size": "use distributed.deepspeed",
    "context_parallel_size": "use distributed.deepspeed",
    "liger_kernel": "the fused head does the same and is always on; remove it",
    "use_liger_kernel": "the fused head does the same and is always on; remove it",
    "enable_liger_kernel": "the fused head does the same and is always on; remove it",
    "cut_cross_entropy": "the fused head does the same and is always on; remove it",
    "neftune_noise_alpha": "remove it",
    "rope_scaling": "use model.rope",
    "special_tokens": "use model.new_tokens for tokens that the model lacks",
    "streaming": "remove it",
    "plugins": "remove it",
}
"""Keys of these tools that nothing here does, and what to do instead."""
A_RECIPE_HAS = 2
"""Keys of one tool in a recipe without a section of ours make it that tool's recipe."""


def tool_of(keys: Collection[str]) -> str | None:
    """The tool whose keys most of these are; None if hardly any is."""
    found = {name: sum(_plain(key) in table for key in keys) for name, table in TOOLS.items()}
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= A_RECIPE_HAS else None


def counterpart(key: str) -> str | None:
    """The sentence on another tool's key; None for a key of none."""
    key = _plain(key)
    if key in MISSING:
        return f'"{key}" has no counterpart here; {MISSING[key]}'
    for name, table in TOOLS.items():
        if key in table:
            return f'{name}\'s "{key}" is {table[key]} here'
    return None


def _plain(key: str) -> str:
    """`--train-type` as the tools' files write it."""
    return key.lstrip("-").replace("-", "_").lower()
