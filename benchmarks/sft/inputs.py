"""Model, tokenizer and rows that every trainer of the comparison reads."""

import json
import math
import random
from pathlib import Path

BATCH_SIZE = 4
SIZES = {
    6_400: dict(hidden_size=256, intermediate_size=768, num_attention_heads=4),
    151_936: dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8),
}
"""Model sizes by vocabulary size."""
EOS_ID = 1
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]


def save_model(folder: Path, vocabulary_size: int) -> None:
    """Save a Qwen3 model of random weights, and a tokenizer whose words are token ids."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = SPECIAL_TOKENS + [str(id) for id in range(len(SPECIAL_TOKENS), vocabulary_size)]
    tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary_size,
        num_hidden_layers=4,
        num_key_value_heads=SIZES[vocabulary_size]["num_attention_heads"] // 2,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=EOS_ID,
        **SIZES[vocabulary_size],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_rows(folder: Path, num_rows: int, vocabulary_size: int) -> None:
    """Write rows of random tokens, with lengths like those of 64 real Chinese instruction rows."""
    generator = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            prompt = min(60, max(4, round(math.exp(generator.gauss(3.4, 0.4)))))
            reply = min(400, max(8, round(math.exp(generator.gauss(4.5, 1.0)))))
            texts = (
                " ".join(
                    str(generator.randrange(len(SPECIAL_TOKENS), vocabulary_size))
                    for _ in range(length)
                )
                for length in (prompt, reply)
            )
            file.write(json.dumps(dict(zip(("prompt", "completion"), texts, strict=True))) + "\n")


def read_rows(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Read each row as token ids: the prompt, and the reply with its end-of-sequence token."""
    lines = (folder / "rows.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (
            [int(word) for word in row["prompt"].split()],
            [*(int(word) for word in row["completion"].split()), EOS_ID],
        )
        for row in rows
    ]
