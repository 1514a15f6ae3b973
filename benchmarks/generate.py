"""Answers per second: in batches with a cache, against one by one without.

    python benchmarks/generate.py outputs/tiny-base/model recipes/data/general_test.jsonl

Both ways answer the same questions with the same model, and must give the same answers.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from yrunner.data.chat.tokenize import prompt_text
from yrunner.evaluation.generate import generate_answers
from yrunner.evaluation.questions import read_questions
from yrunner.models.load import choose_dtype, find_stop_ids, load_model, load_tokenizer


def answer_slowly(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The likeliest next token, again and again, each time from the whole text."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    stops = find_stop_ids(tokenizer)
    while len(new) < max_new_tokens:
        with torch.inference_mode():
            logits = model(
                torch.tensor([ids + new], device=model.device), use_cache=False, logits_to_keep=1
            ).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def main() -> None:
    """Time both ways, and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--take", type=int, help="only so many questions")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    model: Any = load_model(options.model, dtype=choose_dtype("auto"))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    questions = read_questions(options.questions)[: options.take]
    prompts = [prompt_text(question.messages, tokenizer) for question in questions]
    generate_answers(model, tokenizer, prompts[:4], max_new_tokens=4, batch_size=4)  # warm up

    start = time.perf_counter()
    slow = [answer_slowly(model, tokenizer, prompt, options.max_new_tokens) for prompt in prompts]
    slow_seconds = time.perf_counter() - start
    print(f"{len(prompts)} questions, {torch.get_num_threads()} threads, {model.device}")
    print(f"{'one by one, no cache':24} {slow_seconds:8.2f} s")
    for size in options.batch_sizes:
        start = time.perf_counter()
        answers = generate_answers(
            model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=size
        )
        seconds = time.perf_counter() - start
        same = sum(answer.text == other for answer, other in zip(answers, slow, strict=True))
        print(
            f"{f'batches of {size}, cache':24} {seconds:8.2f} s   "
            f"{slow_seconds / seconds:5.1f} times as fast, {same} answers alike"
        )


if __name__ == "__main__":
    main()
