"""What is converted can be checked and trained: settings in the style of each tool's own examples,
on a tiny base, from the files to the result."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import questions
from yrunner.cli import app
from yrunner.storage.run_dir import RunDir

AXOLOTL = """
base_model: base
datasets:
  - path: alpaca.jsonl
    ds_type: json
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.2
output_dir: ./outputs/converted
sequence_len: 128
sample_packing: true
pad_to_sequence_len: true
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 2
max_steps: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
"""
LLAMA_FACTORY = """
### model
model_name_or_path: base
trust_remote_code: true
### method
stage: {stage}
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
{more}
### dataset
dataset: {dataset}
dataset_dir: data
template: default
cutoff_len: 128
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: outputs/converted
logging_steps: 1
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
max_steps: 2
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
TRL_SFT = r"""
trl sft --model_name_or_path base --dataset_name chats.jsonl --output_dir outputs/converted \
  --learning_rate 2.0e-4 --max_steps 2 --packing --per_device_train_batch_size 2 \
  --gradient_accumulation_steps 2 --gradient_checkpointing --eos_token '<|im_end|>' \
  --use_peft --lora_r 4 --lora_alpha 8 --max_length 128 --bf16
"""
TRL_GRPO = r"""
trl grpo --model_name_or_path base --dataset_name prompts.jsonl --output_dir outputs/converted \
  --reward_funcs own.short get_soft_overlong_punishment --num_generations 2 --max_steps 2 \
  --max_completion_length 8 --per_device_train_batch_size 4 --use_peft --lora_r 4 \
  --learning_rate 1.0e-5 --log_completions --gradient_checkpointing
"""
TRL_GKD = r"""
python trl/experimental/gkd/gkd.py --model_name_or_path base --teacher_model_name_or_path base \
  --dataset_name chats.jsonl --output_dir outputs/converted --learning_rate 2e-5 --max_steps 2 \
  --per_device_train_batch_size 2 --max_new_tokens 8 --max_length 128
"""
MS_SWIFT = r"""
CUDA_VISIBLE_DEVICES=0 \
swift sft \
    --model base --use_hf true --tuner_type lora --dataset 'chats.jsonl#12' \
    --torch_dtype bfloat16 --max_steps 2 --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 4 --lora_alpha 8 \
    --target_modules all-linear --gradient_accumulation_steps 4 --eval_steps 50 --save_steps 50 \
    --save_total_limit 2 --logging_steps 5 --max_length 128 --output_dir outputs/converted \
    --warmup_ratio 0.05 --dataset_num_proc 4 --dataloader_num_workers 4
"""
Y_TRAINER = r"""
python -m training_code.start_training \
    --model_path_to_load base \
    --training_type 'sft' \
    --use_NLIRG 'true' \
    --use_lora 'true' \
    --lora_rank 4 \
    --batch_size 1 \
    --token_batch 10 \
    --epoch 1 \
    --data_path alpaca.json \
    --output_dir outputs/converted
"""
SETTINGS = {
    "axolotl.yml": AXOLOTL,
    "llama_factory_sft.yaml": LLAMA_FACTORY.format(stage="sft", dataset="mine", more=""),
    "llama_factory_dpo.yaml": LLAMA_FACTORY.format(
        stage="dpo", dataset="pairs", more="pref_beta: 0.1\npref_loss: sigmoid"
    ),
    "trl_sft.sh": TRL_SFT,
    "trl_grpo.sh": TRL_GRPO,
    "trl_gkd.sh": TRL_GKD,
    "swift_sft.sh": MS_SWIFT,
    "y_trainer.sh": Y_TRAINER,
}
ON_THIS_MACHINE = ("model.dtype=float32", "model.attention=auto", "train.optimizer=adamw_torch")
"""What a GPU of the old tool's examples has, and a processor may not."""


@pytest.fixture
def peer(tmp_path: Path, make_model, capitals_tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where another tool was used: a base, data in its forms, and settings."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("base")
    capitals_tokenizer.save_pretrained("base")
    rows = [
        {"instruction": question, "input": "", "output": answer}
        for question, answer in questions(16)
    ]
    texts = {"alpaca.json": rows, "data/mine.json": rows}
    texts["data/pairs.json"] = [
        {
            "conversations": [{"from": "human", "value": row["instruction"]}],
            "chosen": {"from": "gpt", "value": row["output"]},
            "rejected": {"from": "gpt", "value": "I do not know."},
        }
        for row in rows
    ]
    texts["data/dataset_info.json"] = {
        "mine": {"file_name": "mine.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
            },
        },
    }
    Path("data").mkdir()
    for name, content in texts.items():
        Path(name).write_text(json.dumps(content), "utf-8")
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]
    prompts = [{"prompt": row["instruction"], "solution": row["output"]} for row in rows]
    for name, lines in (("alpaca", rows), ("chats", chats), ("prompts", prompts)):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        Path(f"{name}.jsonl").write_text(text, "utf-8")
    Path("own.py").write_text(
        "def short(completions, **kwargs):\n    return [1 / (1 + len(it)) for it in completions]\n",
        "utf-8",
    )
    for name, text in SETTINGS.items():
        Path(name).write_text(text, "utf-8")
    return tmp_path


def yrun(*arguments: str) -> None:
    ended = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize("name", SETTINGS)
def test_a_converted_recipe_is_checked_and_trained(peer: Path, name: str):
    recipe = f"{Path(name).stem}.recipe.yaml"
    yrun("convert", name, "-o", recipe)
    changes = [*ON_THIS_MACHINE, "eval.budget=0.05", "drift.rows=0"]
    code = ["--trust-code"] if name == "trl_grpo.sh" else []
    yrun("check", recipe, "--sample", "0", *code, *changes)
    yrun("train", recipe, *code, *changes)
    folder = RunDir(next(Path("outputs").glob("*/metrics.jsonl")).parent)
    assert folder.is_finished()
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert any("loss" in record for record in records)
