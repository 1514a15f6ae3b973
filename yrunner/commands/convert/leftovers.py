"""The last keys: changes of the base, and those that need no counterpart or have none."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from yrunner.commands.convert.conversion import Conversion, number, words
from yrunner.recipe.other_tools import MISSING
from yrunner.text_files import read_text

REASONS = {
    "not needed: data is prepared once, with all cores": (
        "preprocessing_num_workers dataset_num_proc dataset_processes dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor preprocessing_batch_size "
        "dataloader_persistent_workers dataloader_drop_last remove_unused_columns"
    ),
    "not needed: prepared data is kept and found again by its content": (
        "overwrite_cache dataset_prepared_path load_from_cache_file tokenized_path cache_dir "
        "last_run_prepared_path download_mode packing_num_proc sample_packing_eff_est "
        "total_num_tokens sample_packing_bin_size sample_packing_group_size lazy_tokenize "
        "data_shared_file_system"
    ),
    "not needed: the options --overwrite and --resume of yrun train": (
        "overwrite_output_dir auto_resume_from_checkpoints ignore_data_skip"
    ),
    "not needed: the command says it": ("do_train do_eval do_predict"),
    "not needed: the run folder has every figure, plot and log": (
        "plot_loss logging_dir run_name logging_first_step logging_strategy "
        "include_num_input_tokens_seen include_tokens_per_second log_level "
        "include_effective_tokens_per_second disable_tqdm print_param_status "
        "logging_nan_inf_filter use_process_bar debug create_checkpoint_symlink add_version "
        "check_model local_rank ddp"
    ),
    "not needed: checkpoints hold all that --resume needs, and weights are safetensors": (
        "save_only_model save_optimizer_state save_safetensors safe_serialization "
        "save_on_each_node save_first_step max_shard_size"
    ),
    "not needed: padding is chosen to waste little, and examples of a pack never see each other": (
        "pad_to_sequence_len pad_to_multiple_of padding_free batching_strategy "
        "eval_sample_packing eval_packing packing_strategy group_by_length auto_find_batch_size "
        "padding_side flash_attention flex_attention sample_packing_sequentially "
        "group_by_modality_length"
    ),
    "not needed: full logits never exist here, and LoRA layers are computed together": (
        "use_liger_kernel enable_liger_kernel liger_kernel cut_cross_entropy use_liger_loss "
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_glu_activation liger_swiglu "
        "liger_layer_norm liger_cross_entropy liger_fused_linear_cross_entropy "
        "liger_use_token_scaling flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_mlp flash_attn_fuse_qkv lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "use_unsloth use_unsloth_gc use_kernels fused_attn_kernel chunked_cross_entropy "
        "use_logits_to_keep tiled_mlp use_v1_kernels unsloth_lora_mlp"
    ),
    "not needed: read from the model's own files": (
        "tokenizer_type model_type use_fast_tokenizer tokenizer_use_fast tokenizer_legacy "
        "cls_model_config lora_task_type task_type resize_vocab model_class "
        "split_special_tokens is_llama_derived_model is_falcon_derived_model "
        "is_mistral_derived_model is_qwen_derived_model type_of_model tuner_backend"
    ),
    "not needed: chosen for the machine": (
        "tf32 torchdistx_path experimental_skip_move_to_device device_map "
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage infer_dtype infer_backend bf16_full_eval "
        "fp16_full_eval fp16_opt_level half_precision_backend empty_cache_steps "
        "torch_empty_cache_steps quantization_device_map use_hf ddp_timeout "
        "ddp_find_unused_parameters ddp_backend low_cpu_mem_usage accelerator_config"
    ),
}
NOT_NEEDED = {key: reason for reason, keys in REASONS.items() for key in keys.split()}
"""Why keys of other tools need no counterpart."""
TOKENS = ("hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token", "hf_use_auth_token",
          "swanlab_api_key", "swanlab_token", "wandb_api_key")  # fmt: skip
FSDP = re.compile(
    r"fsdp.*|.*_parallel_size|dp_(shard|replicate)_size|cp_(size|mode)|sequence_parallel.*"
)


REMEDIES = (
    (r"eos_token", "not needed: the chat template says where a turn ends"),
    (r"pad_token", "not needed: padding is never learned from"),
    (r"special_tokens|add_(special_)?tokens|tokens|new_special_tokens.*|init_special_tokens"
     r"|tokenizer_config|resize_token_embeddings.*|added_tokens_overrides",
     "write new ones as model.new_tokens and tuning.train_tokens, which trains others too"),
    (r"rope_scaling|rope_parameters|overrides_of_model_config",
     "for longer texts, write model.rope with kind and factor"),
    (r"strict", "not needed: a recipe is always checked"),
    (r"eot_tokens", "not needed: the chat template says where a turn ends"),
    (r"vllm|vllm_.*|use_vllm|sleep_level|offload_(model|optimizer)|move_model_batches|async_generate",
     "see rollout.engine"),
    (r"log_completions|num_completions_to_print", "not needed: rollouts.jsonl has every answer"),
    (r"(steps_per_generation|generation_batch_size)",
     "answers are written for one update at a time; see rollout.updates_per_rollout"),
    (r"trl|ebft|reward_(?!model$).*|num_generations.*|max_completion_length|epsilon.*"
     r"|grpo_.*|ppo_.*|rollout_.*|temperature|top_[kp]"
     r"|teacher_.*|beta|lmbda|seq_kd|gkd_.*|response_length|scale_rewards",
     "nothing here does it; see rl.md and distill.md in docs/guide"),
    (r"image_.*|video_.*|audio_.*|.*_pixels|processor_type|freeze_(vision|language|multi|vit|aligner|llm|mm).*"
     r"|vit_.*|aligner_.*|skip_prepare_dataset|media_dir|use_audio_in_video|size_divisor|agent_template",
     "only text is learned from"),
    (r"fp8.*|qat|nvfp4.*|quantize_moe_experts|gptq.*|llmcompressor|model_quantization_config.*|hqq_.*"
     r"|quant_(bits|method|config)|quantization_.*|loftq.*|use_onebitllms",
     "weights are floating point, or 4 or 8 bits by bitsandbytes; see tuning.kind qlora"),
    (r"use_(galore|apollo|badam|muon|adam_mini|llama_pro)|(galore|apollo|badam|lisa|relora|jagged)_?.*"
     r"|optim_(args|target_modules|config)|reinit_weights|embedding_lr.*|lr_groups|lr_quadratic_warmup",
     "nothing here does it; see train.optimizer and train.lr_scheduler"),
    (r"pissa_.*|init_weights|lora_ga_.*|oft_.*|module_dropout|lora_(fan_in_fan_out|target_parameters|bias)"
     r"|peft.*|peft_.*|lora_layer.*|freeze_(trainable|extra)_.*|target_(regex|parameters)|unfrozen_parameters",
     "nothing here does it; see tuning"),
    (r"export_.*|merge_lora", "see merge, and the command yrun merge"),
    (r"loss_watchdog_.*", "see train.spikes"),
    (r"streaming.*|.*buffer_size|interleave_prob.*|mix_strategy|stopping_strategy|dataset_streaming"
     r"|pretrain_multipack.*|cached_.*dataset",
     "data is prepared as a whole before training; sources are mixed by take and share"),
    (r"adam_(beta[12]|epsilon)", "AdamW takes 0.9, 0.999 and 1e-8 here"),
    (r"cosine_.*|lr_scheduler_kwargs|min_lr.*", "the schedule falls to zero"),
    (r"eval_.*|do_causal_lm_eval|predict_with_generate|max_new_tokens|generation_.*|num_beams"
     r"|compute_accuracy|num_return_sequences|stop_words",
     "see eval, and the command yrun eval"),
    (r".*experts.*|.*moe.*|router_.*|use_(scattermoe|sonicmoe)|expert_.*|mixture_of_depths",
     "layers of experts are trained as the model has them"),
    (r"metric_for_best_model|greater_is_better", "the best is that of the lowest validation loss"),
    (r"report_to", "see train.trackers"),
    (r"plugins", "not needed for kernels; nothing here does what the others do"),
    (r"kt_.*|use_(kt|ray|mca)|ray_.*|.*megatron.*", "see distributed"),
    (r"model_config|model_kwargs|overrides_of_.*", "change the model's config.json"),
    (r"(model_|dataset_)?revision|model_revision", "save that revision to a folder"),
    (r"batch_size", "set train.batch_size times train.gradient_accumulation_steps"),
    (r"dataset_exact_deduplication|min_sample_len", "yrun check names rows that occur twice"),
    (r"ref_.*|sync_ref_model", "the reference is the model as the run began"),
)  # fmt: skip
"""Keys without a counterpart, and what to do instead; the first pattern counts."""


def remedy(key: str) -> str:
    """What to do instead of a key without a counterpart."""
    found = next((text for pattern, text in REMEDIES if re.fullmatch(pattern, key)), None)
    known = MISSING.get(key)
    return found or (known if known and known != "remove it" else "nothing here does it")


def _new_tokens(c: Conversion) -> None:
    """Tokens that the old tool adds, in a list, a text or a file."""
    new: list[str] = []
    for key in ("tokens", "add_tokens", "add_special_tokens", "new_special_tokens"):
        given = c.get(key)
        file = c.find(given) if isinstance(given, str) else None
        if file is not None and file.is_file():
            given = read_text(file)
        found = words(given) if isinstance(given, str | list) else []
        if found:
            new += [token for token in found if token not in new]
            how = "a part of the text of answers here" if "special" in key else ""
            c.carry(key, "model.new_tokens", list(new), how)


def _rope(c: Conversion) -> None:
    """Rope that is scaled by a factor of its own."""
    given: Any = c.get("rope_scaling")
    if isinstance(given, str):
        with suppress(ValueError):
            given = json.loads(given)
    if not isinstance(given, Mapping):
        return
    kind = given.get("rope_type", given.get("type"))
    factor = number(given.get("factor"))
    if kind in ("yarn", "linear") and isinstance(factor, int | float) and factor > 1:
        c.carry("rope_scaling", "model.rope", {"kind": kind, "factor": float(factor)})


def convert_leftovers(c: Conversion) -> None:
    """Convert changes of the base, and name every other key; call it last."""
    _new_tokens(c)
    _rope(c)
    for key in list(c.left):
        value = c.left[key]
        if key in NOT_NEEDED:
            c.without(key, NOT_NEEDED[key])
        elif key in TOKENS:
            c.without(key, "set it in the environment, never in a file")
        elif key.startswith(("wandb_", "swanlab_", "mlflow_", "trackio_", "comet_", "otel_")):
            c.without(key, "the trackers' own environment variables")
        elif FSDP.fullmatch(key) and value:
            c.without(key, "use distributed.deepspeed")
        elif key == "special_tokens" and isinstance(value, dict) and set(value) <= {"pad_token"}:
            c.without(key, "not needed: padding is never learned from")
    c.rest(remedy)
