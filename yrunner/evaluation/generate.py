"""Let a model answer prompts, many at once."""

# B = prompts of a batch, T = tokens of the longest

from collections.abc import Callable, Sequence
from typing import Any

import torch

from yrunner.models.load import find_stop_ids

Advance = Callable[[int], None]
"""Called with the number of prompts answered since the last call."""


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = lambda _: None,
) -> list[str]:
    """The greedy answer to each prompt, in order, without special tokens and outer blanks.

    Prompts are texts as the chat template renders them. They are answered longest first, so that
    a batch holds prompts of like length, and padded on the left, where padding changes nothing.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _answer_batch(
            model, tokenizer, [encoded[index] for index in chosen], max_new_tokens
        )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
        advance(len(chosen))
    model.train(was_training)
    return answers


def _answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    longest = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    input_ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=input_ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=_stop_ids(model, tokenizer),
        )
    new_BT = output_BT[:, longest:]
    return list(tokenizer.batch_decode(new_BT, skip_special_tokens=True))


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those that the model was made with, and its template's."""
    known = model.generation_config.eos_token_id
    ids = [known] if isinstance(known, int) else list(known or [])
    return sorted({*ids, *find_stop_ids(tokenizer)})
