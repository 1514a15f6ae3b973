"""Train with TRL: PYTHON benchmarks/sft/with_trl.py FOLDER, with the Python that has TRL."""

import sys
import time
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def main(folder: Path) -> None:
    """Train on the rows of the folder and print the seconds that it took."""
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    started = time.perf_counter()
    trainer.train()
    print(f"seconds of training: {time.perf_counter() - started:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
