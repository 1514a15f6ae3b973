"""Settings of other tools become recipes; each of their keys is in the list exactly once."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from yrunner.commands.convert.command import (
    convert,
    convert_settings,
    missing_packages,
    recipe_text,
    tool_named,
)
from yrunner.commands.convert.conversion import Conversion, Outcome, known_keys, leaves
from yrunner.commands.convert.settings import TOOLS, read_settings
from yrunner.errors import RecipeError, YRunnerError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe

ROWS = '{"instruction": "Who?", "input": "", "output": "Me."}\n' * 10

AXOLOTL = {
    "plain": """
base_model: acme/base
datasets:
  - path: rows.jsonl
    ds_type: json
    type: alpaca
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1.5
learning_rate: 2e-4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sample_packing: true
val_set_size: 0.1
bf16: auto
wandb_project:
special_tokens:
  pad_token: <pad>
context_parapllel_size: 2
""",
    "qlora": """
base_model: acme/base
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target_modules: '.*layers.*(self_attn|mlp)\\.(q|k|v|o)_proj'
bnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}
datasets: [{path: acme/chats, type: chat_template, field_messages: talk, split: 'train[:5%]'}]
sequence_len: 512
excess_length_strategy: truncate
micro_batch_size: 1
max_steps: 100
warmup_steps: 10
num_epochs: 3
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
learning_rate: 0.0001
""",
    "grpo": """
base_model: acme/base
rl: grpo
trl:
  beta: 0.001
  max_completion_length: 96
  num_generations: 4
  use_vllm: true
  reward_funcs: [own.short]
  reward_weights: [2.0]
  loss_type: dr_grpo
datasets:
  - path: rows.jsonl
    type: own.transform
sequence_len: 512
micro_batch_size: 4
num_epochs: 1
sample_packing: true
lm_eval_tasks: [arc_easy, hellaswag]
""",
    "dpo": """
base_model: acme/base
rl: dpo
rl_beta: 0.2
rpo_alpha: 0.5
datasets:
  - path: rows.jsonl
    type:
      field_prompt: question
      field_chosen: good
      field_rejected: bad
      prompt_format: "[INST] {prompt} [/INST]"
sequence_len: 1024
micro_batch_size: 1
num_epochs: 1
learning_rate: 1e-6
train_on_inputs: true
sample_packing: true
early_stopping_patience: 3
""",
    "reward": """
base_model: acme/base
reward_model: true
center_rewards_coefficient: 0.01
adapter: lora
load_in_8bit: true
lora_r: 4
lora_alpha: 8
datasets: [{path: acme/pairs, type: bradley_terry.chat_template}]
deepspeed: zero2.json
micro_batch_size: 1
learning_rate: 1e-5
""",
    "pretraining": """
base_model: acme/base
pretraining_dataset: [{path: acme/texts, name: en, type: pretrain, text_column: body}]
sequence_len: 4096
max_steps: 500
micro_batch_size: 1
learning_rate: 1e-5
""",
}
LLAMA_FACTORY = {
    "sft": """
### model
model_name_or_path: acme/base
trust_remote_code: false
stage: sft
do_train: true
finetuning_type: lora
dataset: mine,theirs
dataset_dir: data
template: no_such_template
cutoff_len: 1024
max_samples: 6
val_size: 2
output_dir: saves/one
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
report_to: none
""",
    "dpo": """
model_name_or_path: acme/base
stage: dpo
pref_loss: simpo
pref_beta: 2.0
simpo_gamma: 1.0
finetuning_type: lora
quantization_bit: 4
quantization_method: bnb
double_quantization: false
lora_rank: 8
dataset: pairs
template: default
per_device_train_batch_size: 1
packing: true
""",
    "ppo": """
model_name_or_path: acme/base
stage: ppo
reward_model: tiny
reward_model_type: full
finetuning_type: lora
dataset: mine
template: default
cutoff_len: 512
ppo_epochs: 2
ppo_target: 6.0
ppo_whiten_rewards: false
ppo_buffer_size: 1
top_p: 0.9
max_new_tokens: 64
packing: true
""",
    "freeze": """
model_name_or_path: ./tiny
stage: sft
finetuning_type: freeze
freeze_trainable_layers: 2
lora_rank: 8
dataset: mine
template: default
neat_packing: true
mask_history: true
use_dft_loss: true
""",
    "text": """
model_name_or_path: acme/base
stage: pt
finetuning_type: full
dataset: texts
cutoff_len: 512
deepspeed: examples/deepspeed/ds_z2_offload_config.json
save_strategy: epoch
logging_steps: 0.1
""",
}
LLAMA_FACTORY["v1"] = """
model: acme/base
model_class: llm
peft_config: {name: lora, r: 4, lora_alpha: 8, target_modules: all}
train_dataset: data/v1.yaml
micro_batch_size: 1
cutoff_len: 256
max_steps: 10
learning_rate: 1.0e-4
"""
TRL = {
    "sft.yaml": """
model_name_or_path: acme/base
dataset_name: acme/chats
dataset_train_split: train_sft
dataset_test_split: test_sft
learning_rate: 2.0e-5
report_to: [trackio, wandb]
max_length: 512
packing: true
assistant_only_loss: true
env: {CUDA_VISIBLE_DEVICES: "0"}
eval_strategy: epoch
""",
    "dpo.sh": r"""
#!/bin/bash
MODEL=acme/base
export NCCL_DEBUG=INFO  # it tells more
ARGS="--max_steps 5"
# a comment
accelerate launch --config_file deepspeed_zero2.yaml --num_processes 4 trl/scripts/dpo.py \
    --model_name_or_path $MODEL --dataset_name acme/pairs \
    --loss_type sigmoid sft --loss_weights 1.0 0.2 \
    --learning_rate=5e-7 --num_train_epochs 1 --beta 0.05 --save_strategy no --eval_steps 9 \
    --use_peft --lora_r 32 --lora_target_modules q_proj v_proj \
    --gradient_checkpointing --no_such_key 3 $ARGS
""",
    "kto.sh": r"""
trl kto --model_name_or_path acme/base --dataset_name rows.jsonl --output_dir out \
  --warmup_steps 0.1 --eval_strategy steps --eval_steps 50 --load_in_4bit && echo done
""",
    "reward.sh": r"""
python examples/scripts/reward_modeling.py --model_name_or_path acme/base \
  --dataset_name acme/pairs --use_peft --load_in_4bit --center_rewards_coefficient 0.01
""",
    "grpo.sh": r"""
trl grpo --model_name_or_path acme/base --dataset_name rows.jsonl --use_vllm \
  --reward_funcs accuracy_reward think_format_reward own.short get_soft_overlong_punishment \
  --reward_weights 1.0 0.5 0.2 0.1 --num_generations 4 --max_completion_length 128 \
  --temperature 0.7 --top_p 1.0 --top_k 50 --scale_rewards none --epsilon 0.1 --use_peft
""",
    "rloo.sh": """
trl rloo --model_name_or_path acme/base --dataset_name rows.jsonl \\
  --reward_funcs own.short own.short --mask_truncated_completions true --beta 0.02
""",
    "gkd.sh": r"""
python examples/scripts/gkd.py --model_name_or_path acme/base --dataset_name rows.jsonl \
  --teacher_model_name_or_path acme/large --lmbda 0.3 --beta 0.1 --temperature 0.8 \
  --max_new_tokens 64 --seq_kd false
""",
    "simpo.sh": r"""
trl cpo --loss_type simpo --cpo_alpha 0.0 --model_name_or_path acme/base --dataset_name acme/pairs
""",
}
MS_SWIFT = {
    "sft.sh": r"""
NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=0,1 \
swift sft \
    --model acme/base --tuner_type lora \
    --dataset 'acme/one#500' rows.jsonl#5 \
    --lora_rank 8 --lora_alpha 32 --target_modules all-linear \
    --max_length 2048 --truncation_strategy right --system 'Be kind.' \
    --deepspeed zero3 --packing true --loss_scale last_round
""",
    "dpo.yaml": """
model: acme/base
tuner_type: full
rlhf_type: dpo
dataset: acme/pairs
split_dataset_ratio: 0.01
rpo_alpha: 0.1
attn_impl: flash_attn
lora_rank: 8
""",
    "grpo.sh": r"""
swift rlhf --rlhf_type grpo --model acme/base --dataset rows.jsonl --overlong_filter true \
  --reward_funcs accuracy format soft_overlong repetition --soft_cache_length 128 \
  --repetition_n_grams 4 --max_completion_length 512 --epsilon 0.2 --epsilon_high 0.28 \
  --loss_type dapo --scale_rewards group --num_generations 8 --per_device_train_batch_size 8 \\
  --dynamic_sample true --max_resample_times 5
""",
    "gkd.sh": """
swift rlhf --rlhf_type gkd --model acme/base --teacher_model acme/large --dataset rows.jsonl \
  --lmbda 0 --beta 1 --max_completion_length 99
""",
    "pt.sh": """
swift pt --model acme/base --train_type full --dataset rows.jsonl --streaming true --max_steps 10
""",
    "rm.json": """{"model": "acme/base", "rlhf_type": "rm", "dataset": ["acme/pairs"],
\t"tuner_type": "lora", "quant_bits": 4, "quant_method": "bnb", "lora_rank": 4}""",
}
Y_TRAINER = {
    "sft.sh": r"""
python -m training_code.start_training \
    --model_path_to_load acme/base --training_type 'sft' --epoch 3 --checkpoint_epoch '0,1' \
    --use_NLIRG 'true'\  # on
    --data_path rows.jsonl --output_dir outputdir --use_lora 'true' --batch_size 1 \\ # two
    --token_batch 10  # of targets \
    --gradient_accumulation_steps 4 \
    --lora_target_modules "q_proj,k_proj"
""",
    "sft_ds.sh": r"""
deepspeed --include localhost:0,1,2 --module start_training \
    --model_path_to_load acme/base --training_type sft --use_deepspeed 'true' \
    --data_path rows.jsonl --output_dir o --token_batch 10 --seed 7
""",
    "cpt.bat": r"""
@echo off
python -m start_training ^
    --model_path_to_load "acme/base" ^
    --training_type "cpt" ^
    --pack_length 1024 ^
    --lora_target_modules "q_proj" ^
    --data_path ".\rows.jsonl" --output_dir ".\out"
""",
    "sort.sh": r"""
python -m training_code.utils.schedule.sort \
    –data_path rows.jsonl –output_path sorted.json –model_path acme/base –mode "similarity_rank"
""",
}
FILES = {
    **{f"axolotl-{name}.yml": text for name, text in AXOLOTL.items()},
    **{f"llama-{name}.yaml": text for name, text in LLAMA_FACTORY.items()},
    **{f"trl-{name}": text for name, text in TRL.items()},
    **{f"swift-{name}": text for name, text in MS_SWIFT.items()},
    **{f"y-{name}": text for name, text in Y_TRAINER.items()},
}
TOOL_OF = dict(zip(("axolotl", "llama", "trl", "swift", "y"), TOOLS, strict=True))
DATASET_INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
    "theirs": {"hf_hub_url": "acme/theirs", "formatting": "sharegpt", "subset": "en"},
    "pairs": {
        "file_name": "mine.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "rejected"},
        "tags": {"role_tag": "from", "user_tag": "human", "assistant_tag": "somebody"},
    },
    "texts": {"file_name": "mine.json", "columns": {"prompt": "text"}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every settings file, and the data and model that they name."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text(json.dumps([{"q": "a", "a": "b"}] * 8), "utf-8")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO), "utf-8")
    sources = "mine: {path: data/mine.json, source: local, converter: alpaca, size: 3}\n"
    (tmp_path / "data" / "v1.yaml").write_text(sources, "utf-8")
    (tmp_path / "own.py").write_text("def short(completions):\n    return [1.0]\n", "utf-8")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"num_hidden_layers": 8}', "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(folder: Path, name: str, *overrides: str) -> tuple[Recipe, Conversion]:
    """The recipe that a file becomes, as written and loaded again, and the conversion."""
    c, _ = convert_settings(folder / name, tool=None, recipe_folder=folder)
    text = recipe_text(c, folder / name, overrides, output=folder / "r.yaml", allow_missing=False)
    (folder / "r.yaml").write_text(text, "utf-8")
    return load_recipe(folder / "r.yaml"), c


def entry(c: Conversion, key: str) -> tuple[Outcome, str]:
    found = [(it.outcome, it.note) for it in c.entries if it.key == key]
    assert len(found) == 1, key
    return found[0]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_in_the_list_once_and_the_recipe_loads(folder: Path, name: str):
    settings = read_settings(folder / name, None)
    recipe, c = converted(folder, name)
    assert c.tool == settings.tool == TOOL_OF[name.partition("-")[0]]
    keys = Counter(key for top, value in settings.keys.items() for key, _ in leaves(top, value))
    listed = Counter(it.key for it in c.entries if not it.key.startswith("dataset_info."))
    assert listed == keys
    assert all(it.note for it in c.entries if it.outcome is not Outcome.CARRIED)
    assert recipe.model.base in ("acme/base", str(folder / "tiny"))


def test_axolotl_drops_long_rows_and_loses_a_misspelt_key_silently(folder: Path):
    recipe, c = converted(folder, "axolotl-plain.yml")
    assert (recipe.data.too_long, recipe.data.packing) == ("drop", True)
    assert recipe.data.validation_share == 0.1
    assert recipe.train.epochs == 2 and "1.5 there" in entry(c, "num_epochs")[1]
    assert recipe.train.optimizer == "adamw_8bit"
    assert recipe.tuning.model_dump()["dropout"] == 0.0
    outcome, note = entry(c, "context_parapllel_size")
    assert outcome is Outcome.IGNORED
    assert note == 'unknown to Axolotl, did you mean "context_parallel_size"?'
    assert entry(c, "special_tokens.pad_token")[0] is Outcome.WITHOUT
    assert entry(c, "datasets[0].type")[0] is Outcome.CHANGED


def test_axolotl_qlora_keeps_quantization_targets_and_a_part_of_the_rows(folder: Path):
    recipe, c = converted(folder, "axolotl-qlora.yml")
    tuning = recipe.tuning.model_dump()
    assert (tuning["kind"], tuning["quant_type"], tuning["double_quant"]) == ("qlora", "fp4", False)
    assert tuning["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    (source,) = recipe.data.train
    assert (source.format, source.columns) == ("messages", {"messages": "talk"})
    assert source.share == 0.05
    assert recipe.train.max_steps == 100 and recipe.train.epochs is None
    assert recipe.train.warmup_ratio == 0.1
    assert entry(c, "num_epochs")[0] is Outcome.IGNORED
    sharded = recipe.distributed.deepspeed
    assert sharded is not None and (sharded.stage, sharded.offload) == (2, "cpu")
    assert "ZeRO 3 cannot shard" in entry(c, "deepspeed")[1]


def test_new_tokens_and_a_longer_rope_are_carried_over_and_trained(folder: Path):
    added = "tokens: [<call>, </call>]\nrope_scaling: {type: yarn, factor: 4.0}\n"
    (folder / "longer.yml").write_text(AXOLOTL["plain"] + added, "utf-8")
    recipe, c = converted(folder, "longer.yml")
    assert recipe.model.new_tokens == recipe.tuning.train_tokens == ["<call>", "</call>"]
    assert (recipe.model.rope.kind, recipe.model.rope.factor) == ("yarn", 4.0)
    assert entry(c, "tokens")[0] is Outcome.CARRIED
    # Of a kind that is not here, and of LLaMA-Factory, which takes the factor from the lengths.
    for other in ("{type: dynamic, factor: 4.0}", "yarn"):
        text = AXOLOTL["plain"] + f"rope_scaling: {other}\n"
        (folder / "other.yml").write_text(text, "utf-8")
        recipe, c = converted(folder, "other.yml")
        assert recipe.model.rope is None
        key = "rope_scaling.type" if "dynamic" in other else "rope_scaling"
        assert entry(c, key) == (
            Outcome.WITHOUT, "for longer texts, write model.rope with kind and factor"
        )  # fmt: skip
    (folder / "tokens.txt").write_text("<a>\n<b>\n", "utf-8")
    text = AXOLOTL["plain"] + "tokens: tokens.txt\n"
    (folder / "file.yml").write_text(text, "utf-8")
    assert converted(folder, "file.yml")[0].model.new_tokens == ["<a>", "<b>"]


def test_axolotl_preferences_lose_what_has_no_meaning_for_pairs(folder: Path):
    recipe, c = converted(folder, "axolotl-dpo.yml")
    assert recipe.train.stage == "preference"
    assert recipe.loss.model_dump() | {"beta": 0.2, "sft": 0.5} == recipe.loss.model_dump()
    assert recipe.data.train[0].columns == {
        "prompt": "question",
        "chosen": "good",
        "rejected": "bad",
    }
    assert entry(c, "sample_packing")[0] is Outcome.IGNORED
    assert entry(c, "train_on_inputs")[0] is Outcome.CHANGED
    assert entry(c, "early_stopping_patience") == (
        Outcome.CHANGED,
        "there are no validation rows",
    )


def test_a_reward_model_is_neither_quantized_nor_sharded(folder: Path):
    for name in ("axolotl-reward.yml", "trl-reward.sh", "swift-rm.json"):
        recipe, _ = converted(folder, name)
        assert (recipe.train.stage, recipe.tuning.kind) == ("reward", "lora")
        assert recipe.distributed.deepspeed is None


def test_plain_text_is_continued_pretraining(folder: Path):
    for name in ("axolotl-pretraining.yml", "llama-text.yaml", "swift-pt.sh", "y-cpt.bat"):
        recipe, _ = converted(folder, name)
        assert recipe.train.stage == "cpt", name
    recipe, _ = converted(folder, "axolotl-pretraining.yml")
    assert recipe.data.train[0].columns == {"text": "body"}
    recipe, _ = converted(folder, "llama-text.yaml")
    assert recipe.data.train[0].format == "text" and recipe.data.packing
    assert recipe.distributed.deepspeed is not None
    assert recipe.distributed.deepspeed.offload == "cpu"


def test_llama_factory_defaults_and_dataset_info_are_written_out(folder: Path):
    recipe, c = converted(folder, "llama-sft.yaml")
    tuning = recipe.tuning.model_dump()
    assert (tuning["rank"], tuning["alpha"], tuning["dropout"]) == (8, 16, 0.0)
    assert recipe.data.too_long == "cut" and recipe.train.gradient_checkpointing
    mine, theirs = recipe.data.train
    assert mine.file == folder / "data" / "mine.json" and mine.take == 6
    assert mine.columns == {"instruction": "q", "output": "a"}
    assert (theirs.hub, theirs.format, theirs.files) == ("acme/theirs", "sharegpt", "*en*")
    # 2 of the 6 + 6 rows that are left of both datasets
    assert recipe.data.validation_share == pytest.approx(2 / 12, abs=1e-6)
    assert entry(c, "dataset_info.theirs.subset")[0] is Outcome.CHANGED
    assert entry(c, "template")[0] is Outcome.WITHOUT


def test_a_file_with_fewer_rows_than_max_samples_is_taken_whole(folder: Path):
    path = folder / "llama-sft.yaml"
    path.write_text(LLAMA_FACTORY["sft"].replace("max_samples: 6", "max_samples: 1000"), "utf-8")
    recipe, c = converted(folder, path.name)
    assert [source.take for source in recipe.data.train] == [None, 1000]
    assert "all 8 rows of data/mine.json" in entry(c, "max_samples")[1]


def test_llama_factory_simpo_on_four_bits(folder: Path):
    recipe, c = converted(folder, "llama-dpo.yaml")
    assert (recipe.loss.kind, recipe.tuning.kind) == ("simpo", "qlora")
    assert recipe.loss.model_dump()["gamma"] == 1.0
    assert recipe.tuning.model_dump()["double_quant"] is False
    assert recipe.data.train[0].columns == {"chosen": "good"}
    assert entry(c, "dataset_info.pairs.tags.assistant_tag")[0] is Outcome.WITHOUT
    assert entry(c, "dataset_info.pairs.tags.user_tag")[0] is Outcome.CARRIED
    assert entry(c, "packing")[0] is Outcome.IGNORED


def test_ppo_becomes_a_run_on_a_reward_model(folder: Path):
    recipe, c = converted(folder, "llama-ppo.yaml")
    assert (recipe.train.stage, recipe.loss.kind) == ("rl", "ppo")
    assert recipe.loss.model_dump()["beta"] == 0.2
    assert [each.kind for each in recipe.rewards] == ["reward_model"]
    rollout = recipe.rollout
    assert (rollout.generations, rollout.updates_per_rollout, rollout.max_new_tokens) == (1, 2, 64)
    assert (rollout.temperature, rollout.truncated) == (0.95, "keep")
    assert entry(c, "ppo_whiten_rewards")[0] is Outcome.CARRIED
    assert entry(c, "reward_model")[0] is Outcome.CHANGED
    for key in ("ppo_target", "ppo_buffer_size", "top_p"):
        assert entry(c, key)[0] is Outcome.WITHOUT
    assert entry(c, "packing")[0] is Outcome.IGNORED


def test_frozen_layers_become_a_share_of_the_models_own(folder: Path):
    recipe, c = converted(folder, "llama-freeze.yaml")
    assert recipe.tuning.model_dump() | {"kind": "freeze", "train_top": 0.25} == (
        recipe.tuning.model_dump()
    )
    assert recipe.data.targets == "last_assistant" and recipe.loss.kind == "dft"
    assert entry(c, "lora_rank")[0] is Outcome.IGNORED


def test_version_1_of_llama_factory_names_its_sources_in_a_file(folder: Path):
    recipe, c = converted(folder, "llama-v1.yaml")
    assert recipe.data.train[0].file == folder / "data" / "mine.json"
    assert recipe.data.train[0].take == 3
    assert recipe.tuning.model_dump()["rank"] == 4
    assert entry(c, "dataset_info.mine.converter")[0] is Outcome.CHANGED


def test_trl_yaml_names_splits_as_files(folder: Path):
    recipe, c = converted(folder, "trl-sft.yaml")
    assert recipe.tuning.kind == "full"
    assert recipe.data.train[0].files == "*train_sft*"
    assert recipe.data.validation[0].files == "*test_sft*"
    assert recipe.train.validate_every == "epoch"
    assert (recipe.data.targets, recipe.data.too_long) == ("assistant", "cut")
    assert entry(c, "env.CUDA_VISIBLE_DEVICES")[0] is Outcome.WITHOUT
    assert recipe.train.trackers == ["wandb"] and entry(c, "report_to")[0] is Outcome.CHANGED


def test_a_trl_command_brings_its_launcher_its_variables_and_its_typo(folder: Path):
    recipe, c = converted(folder, "trl-dpo.sh")
    assert recipe.model.base == "acme/base" and recipe.distributed.processes == 4
    assert recipe.loss.model_dump() | {"form": "sigmoid", "sft": 0.2, "beta": 0.05} == (
        recipe.loss.model_dump()
    )
    assert recipe.train.learning_rate == 5e-7 and recipe.train.max_steps == 5
    assert entry(c, "NCCL_DEBUG")[0] is Outcome.WITHOUT
    assert entry(c, "save_strategy") == (Outcome.CHANGED, "save_strategy no there")
    assert entry(c, "eval_steps") == (Outcome.IGNORED, "eval_strategy is no")
    assert recipe.tuning.model_dump()["targets"] == ["q_proj", "v_proj"]
    assert entry(c, "no_such_key")[0] is Outcome.IGNORED


def test_trl_kto_ignores_quantization_without_an_adapter(folder: Path):
    recipe, c = converted(folder, "trl-kto.sh")
    assert (recipe.loss.kind, recipe.tuning.kind) == ("kto", "full")
    assert recipe.train.warmup_ratio == 0.1
    # nothing is validated: rows.jsonl has no other split
    assert entry(c, "eval_steps")[0] is Outcome.CHANGED
    assert entry(c, "load_in_4bit")[0] is Outcome.IGNORED


def test_ms_swift_takes_numbers_of_rows_from_the_names_of_datasets(folder: Path):
    recipe, c = converted(folder, "swift-sft.sh")
    hub, local = recipe.data.train
    assert (hub.hub, hub.take, local.file, local.take) == (
        "acme/one",
        500,
        folder / "rows.jsonl",
        5,
    )
    assert (recipe.distributed.processes, recipe.data.system) == (2, "Be kind.")
    assert (recipe.data.too_long, recipe.data.targets) == ("cut", "last_assistant")
    assert recipe.train.weight_decay == 0.1
    assert entry(c, "dataset")[0] is Outcome.CHANGED


def test_rewards_of_trl_become_ours_with_their_weights(folder: Path):
    recipe, c = converted(folder, "trl-grpo.sh")
    assert recipe.train.stage == "rl"
    rewards = [reward.model_dump(exclude_defaults=True) for reward in recipe.rewards]
    assert rewards == [
        {"kind": "number", "column": "solution"},
        {"kind": "python", "function": f"{folder / 'own.py'}:short", "weight": 0.2},
        {"kind": "length", "maximum": 1024, "margin": 256, "weight": 0.1},
    ]
    outcome, note = entry(c, "reward_funcs")
    assert outcome is Outcome.CHANGED and "think_format_reward: left out" in note
    rollout = recipe.rollout
    assert (rollout.generations, rollout.max_new_tokens, rollout.temperature) == (4, 128, 0.7)
    assert (rollout.truncated, rollout.engine) == ("keep", "vllm")
    settings = recipe.loss.settings  # type: ignore[union-attr]
    assert (settings.beta, settings.scale, settings.normalize) == (0.0, "none", "tokens")
    assert (settings.clip_low, settings.clip_high) == (0.1, 0.1)
    assert entry(c, "top_p")[0] is Outcome.CARRIED and entry(c, "top_k")[0] is Outcome.WITHOUT
    assert recipe.train.learning_rate == 1e-6
    rloo, _ = converted(folder, "trl-rloo.sh")
    assert rloo.loss.model_dump() == {
        "kind": "rloo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta": 0.02,
    }
    assert (rloo.rollout.generations, rloo.rollout.max_new_tokens) == (2, 512)
    assert [reward.name for reward in rloo.rewards] == ["python_1", "python_2"]
    assert rloo.rollout.truncated == "mask"


def test_rewards_of_axolotl_and_ms_swift_become_ours(folder: Path):
    recipe, c = converted(folder, "axolotl-grpo.yml")
    settings = recipe.loss.settings  # type: ignore[union-attr]
    assert (settings.beta, settings.normalize) == (0.001, "length")
    assert recipe.rewards[0].weight == 2 and recipe.rollout.max_new_tokens == 96
    assert entry(c, "trl.use_vllm")[0] is Outcome.CHANGED
    assert recipe.rollout.engine == "transformers", "vLLM writes for one process alone"
    assert recipe.eval.tasks[0].model_dump()["tasks"] == ["arc_easy", "hellaswag"]
    recipe, c = converted(folder, "swift-grpo.sh")
    rewards = [reward.model_dump(exclude_defaults=True) for reward in recipe.rewards]
    assert [reward["kind"] for reward in rewards] == ["number", "xml", "length", "repetition"]
    assert (rewards[2]["maximum"], rewards[2]["margin"]) == (384, 128)
    settings = recipe.loss.settings  # type: ignore[union-attr]
    assert (settings.clip_low, settings.clip_high, settings.beta) == (0.2, 0.28, 0.04)
    assert recipe.rollout.truncated == "mask" and recipe.rollout.resample == 5


def test_learning_from_a_teacher_keeps_its_divergence_and_its_share(folder: Path):
    recipe, _ = converted(folder, "trl-gkd.sh")
    assert recipe.teacher is not None
    assert recipe.teacher.model_dump(exclude_defaults=True) == {
        "model": "acme/large",
        "weight": 1.0,
        "temperature": 0.8,
        "by": "jsd",
        "beta": 0.1,
        "top": "all",
        "on_policy": 0.3,
        "max_new_tokens": 64,
    }
    recipe, c = converted(folder, "swift-gkd.sh")
    assert recipe.teacher is not None and recipe.teacher.by == "reverse_kl"
    assert recipe.teacher.on_policy == 0
    assert entry(c, "max_completion_length")[0] is Outcome.IGNORED


def test_y_trainers_token_batch_is_divided_by_its_gpus(folder: Path):
    one, c = converted(folder, "y-sft.sh")
    assert (one.train.token_batch, one.loss.kind) == (10, "nlirg")
    assert (one.train.order, one.train.lr_scheduler) == ("as_written", "constant")
    assert (one.train.max_grad_norm, one.data.too_long) == (0.0, "drop")
    assert entry(c, "gradient_accumulation_steps")[0] is Outcome.IGNORED
    three, c = converted(folder, "y-sft_ds.sh")
    assert three.train.token_batch == 4  # 10 / 3, rounded up as Y-Trainer does
    assert three.distributed.processes == 3 and three.tuning.kind == "full"
    assert entry(c, "token_batch")[0] is Outcome.CHANGED


def test_y_trainer_ignores_adapters_and_lengths_of_the_other_kind(folder: Path):
    recipe, c = converted(folder, "y-cpt.bat")
    assert recipe.data.max_length == 1024 and recipe.data.packing
    assert entry(c, "lora_target_modules")[0] is Outcome.IGNORED
    recipe, _ = converted(folder, "y-sort.sh")
    assert recipe.sort.score == "similarity"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("distributed_type: FSDP\n", "a configuration of accelerate launch"),
        ("model: {base: x}\ndata: {train: [{file: y}]}\n", "a recipe already"),
        ("alpha: 1\nbeta: 2\n", "no known tool"),
        ("base_model: a/b\nrl: gdpo\nsequence_len: 8\n", "rl: gdpo is not converted"),
        ("base_model: a/b\nrl: grpo\nsequence_len: 8\n", "it names no reward"),
        ("base_model: a/b\nsequence_len: 8\nmicro_batch_size: 1\n", "it names no data"),
        ("micro_batch_size: 1\nsequence_len: 8\ndatasets: [{path: a/b}]\n", "it names no model"),
        ("base_model: a/b\ndatasets: [{path: gone.jsonl}]\n", "not here: gone.jsonl"),
        ("base_model: [a\n", "x.yaml:1:13"),
        ("base_model: a/b\nbase_model: a/c\nsequence_len: 8\n", "given twice, first on line 1"),
        ("", "x.yaml is empty"),
        ("model_name_or_path: a/b\nstage: ppo\ntemplate: x\ncutoff_len: 9\n", "needs a reward_mo"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_sentence(
    folder: Path, text: str, sentence: str
):
    path = folder / "x.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(YRunnerError) as error:
        written(path, folder / "out.yaml")
    assert sentence in str(error.value)
    assert not (folder / "out.yaml").exists()


def written(path: Path, output: Path, *overrides: str, **options: Any) -> None:
    chosen = {"tool": None, "force": False, "allow_missing": False, "as_machine": False} | options
    convert(path, overrides, output=output, **chosen)


WEIRD = ([], [1, "a"], {"a": 1}, "word", "", -1, 0.5, 1e9, True, None, [{"path": "x"}], " 3")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("axolotl-dpo.yml", ["rl", "rl_beta", "num_epochs", "datasets", "learning_rate"]),
        ("llama-sft.yaml", ["stage", "dataset", "max_samples", "val_size", "warmup_ratio"]),
        ("trl-dpo.sh", ["loss_type", "loss_weights", "beta", "lora_r", "num_train_epochs"]),
        ("trl-grpo.sh", ["reward_funcs", "reward_weights", "num_generations", "temperature"]),
        ("trl-gkd.sh", ["beta", "lmbda", "temperature", "max_new_tokens"]),
        ("axolotl-grpo.yml", ["trl", "rl"]),
        ("swift-grpo.sh", ["loss_type", "scale_rewards", "repetition_n_grams", "epsilon"]),
        ("swift-sft.sh", ["dataset", "lora_rank", "max_length", "deepspeed", "system"]),
        ("y-sft.sh", ["epoch", "training_type", "token_batch", "checkpoint_epoch", "batch_size"]),
    ],
)
def test_values_that_no_recipe_can_have_are_left_out_and_named(
    folder: Path, name: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
):
    settings = read_settings(folder / name, None)
    for key in keys:
        for value in WEIRD:
            changed = replace(settings, keys={**settings.keys, key: value})
            monkeypatch.setattr(
                "yrunner.commands.convert.command.read_settings", lambda path, tool, it=changed: it
            )
            c, _ = convert_settings(folder / name, tool=None, recipe_folder=folder)
            listed = [it.key for it in c.entries if not it.key.startswith("dataset_info.")]
            expected = [k for top, it in changed.keys.items() for k, _ in leaves(top, it)]
            assert sorted(listed) == sorted(expected), (key, value)
            try:
                recipe_text(c, folder / name, [], output=folder / "r.yaml", allow_missing=True)
            except YRunnerError as error:
                assert error.remedy == "no recipe is written", (key, value)


def test_a_value_that_the_schema_refuses_is_left_out_with_its_reason(folder: Path):
    path = folder / "axolotl-plain.yml"
    path.write_text(AXOLOTL["plain"].replace("lora_r: 8", "lora_r: 0"), "utf-8")
    recipe, c = converted(folder, path.name)
    assert recipe.tuning.model_dump()["rank"] == 16
    assert "left out, because it must be a whole number of at least 1" in entry(c, "lora_r")[1]


def test_what_this_machine_lacks_for_the_recipe_is_said(monkeypatch: pytest.MonkeyPatch):
    asks = {"model.attention": "flash_attention_2", "train.optimizer": "paged_adamw_8bit"}
    monkeypatch.setattr("yrunner.commands.convert.command.find_spec", lambda name: None)
    attention, optimizer = missing_packages(asks)
    assert "flash-attn" in attention and "model.attention=auto" in attention
    assert optimizer == (
        "train.optimizer: paged_adamw_8bit needs bitsandbytes; run pip install 'yrunner[qlora]'"
    )
    assert missing_packages({"model.attention": "sdpa", "train.optimizer": "adamw_torch"}) == []
    monkeypatch.setattr("yrunner.commands.convert.command.find_spec", lambda name: name)
    assert missing_packages(asks) == []


def test_a_recipe_is_never_replaced_without_force(folder: Path):
    output = folder / "mine.yaml"
    output.write_text("precious", "utf-8")
    with pytest.raises(YRunnerError, match="already exists"):
        written(folder / "axolotl-plain.yml", output)
    assert output.read_text("utf-8") == "precious"
    written(folder / "axolotl-plain.yml", output, force=True)
    assert load_recipe(output).model.base == "acme/base"


def test_paths_are_relative_to_the_recipe_wherever_it_is(folder: Path):
    written(folder / "axolotl-plain.yml", folder / "recipes" / "deep" / "mine.yaml")
    recipe = load_recipe(folder / "recipes" / "deep" / "mine.yaml")
    assert recipe.data.train[0].file == folder / "rows.jsonl"
    assert "../../rows.jsonl" in (folder / "recipes" / "deep" / "mine.yaml").read_text("utf-8")


def test_missing_paths_can_be_allowed_and_values_given(folder: Path):
    path = folder / "x.yaml"
    path.write_text("sequence_len: 8\ndatasets: [{path: gone.jsonl}]\nnum_epochs: 1\n", "utf-8")
    written(path, folder / "x.out.yaml", "model.base=acme/base", allow_missing=True)
    with pytest.raises(RecipeError, match=r"there is no file .*gone\.jsonl"):
        load_recipe(folder / "x.out.yaml")
    (folder / "gone.jsonl").write_text(ROWS, "utf-8")
    assert load_recipe(folder / "x.out.yaml").model.base == "acme/base"


def test_a_recipe_that_the_schema_refuses_is_not_written(folder: Path):
    with pytest.raises(RecipeError, match="rank"):
        written(folder / "axolotl-plain.yml", folder / "out.yaml", "tuning.rank=0")
    assert not (folder / "out.yaml").exists()


def test_the_list_as_json_has_every_key(folder: Path, capsys: pytest.CaptureFixture[str]):
    written(folder / "trl-dpo.sh", folder / "out.yaml", as_machine=True)
    found = json.loads(capsys.readouterr().out)
    assert found["tool"] == "TRL" and found["problem"] is None
    outcomes = {item["key"]: item["outcome"] for item in found["keys"]}
    assert outcomes["no_such_key"] == "ignored by the old tool itself"
    assert outcomes["learning_rate"] == "carried over"
    assert found["defaults"]["data.too_long"] == "cut"


def test_the_list_names_all_parts(folder: Path, capsys: pytest.CaptureFixture[str]):
    written(folder / "axolotl-plain.yml", folder / "out.yaml")
    text = capsys.readouterr().out
    for title in ("changed (", "without counterpart (", "ignored by Axolotl itself (", "carried"):
        assert title in text
    assert "lora_r: 8 -> tuning.rank: 8" in text


def test_a_command_with_a_yaml_file_has_the_keys_of_both(folder: Path):
    (folder / "run.sh").write_text("trl sft --config trl-sft.yaml --learning_rate 1e-5\n", "utf-8")
    recipe, _ = converted(folder, "run.sh")
    assert recipe.train.learning_rate == 1e-5 and recipe.data.max_length == 512
    (folder / "run.sh").write_text("axolotl train axolotl-plain.yml --lora-r 3\n", "utf-8")
    recipe, _ = converted(folder, "run.sh")
    assert recipe.tuning.model_dump()["rank"] == 3


def test_a_file_of_two_tools_needs_the_name_of_one(folder: Path):
    (folder / "x.yaml").write_text("model_name_or_path: acme/base\nlogging_steps: 1\n", "utf-8")
    with pytest.raises(YRunnerError, match="--from"):
        read_settings(folder / "x.yaml", None)
    assert read_settings(folder / "x.yaml", "TRL").tool == "TRL"
    assert tool_named("llamafactory") == tool_named("LLaMA-Factory") == "LLaMA-Factory"
    with pytest.raises(YRunnerError, match="Use one of axolotl"):
        tool_named("keras")


def test_the_keys_of_every_tool_are_known():
    for tool, key in zip(
        TOOLS,
        ("sequence_len", "cutoff_len", "max_length", "tuner_type", "token_batch"),
        strict=True,
    ):
        assert key in known_keys(tool)
        assert "no_such_key" not in known_keys(tool)


def test_converting_needs_no_torch(folder: Path):
    code = (
        "import sys; from yrunner.cli import app\n"
        "try: app(['convert', 'axolotl-plain.yml', '-o', 'out.yaml'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": str(root)}, check=False
    )
    assert found.returncode == 0 and (folder / "out.yaml").is_file()
