"""What would save memory, and how much: the recipe's update traced again with one key changed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from yrunner.commands.check_machine import this_machine
from yrunner.commands.check_memory import Estimator
from yrunner.data.conversation import TokenizedExample
from yrunner.models.load import choose_dtype
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_model import LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory import Untraceable
from yrunner.training.sharing import Sharing, memory_per_gpu

MOST = 3
"""Keys that are named."""
SMALLEST_SAVING = 0.01
"""Of the peak: less is not worth a word."""


@dataclass(frozen=True)
class Saving:
    """A change of the recipe, as it is typed, and the bytes that it saves at the peak."""

    change: str
    saved: int


@dataclass(frozen=True)
class Variant:
    """The recipe with one key changed, and what its largest micro-batch is then."""

    change: str
    """As it is typed."""
    recipe: Recipe
    micro_batch: Sequence[TokenizedExample]


def find_savings(
    recipe: Recipe, tokenizer: Any, micro_batch: Sequence[TokenizedExample]
) -> list[Saving]:
    """The changes that save most in the run's largest micro-batch, the best first, at most three.

    Estimated as `yrun check` estimates memory; none where the model cannot be traced.
    """
    own = _peak(recipe, tokenizer, micro_batch)
    if own is None:
        return []
    savings = []
    for variant in variants(recipe, micro_batch):
        peak = _peak(variant.recipe, tokenizer, variant.micro_batch)
        if peak is not None and own - peak > SMALLEST_SAVING * own:
            savings.append(Saving(variant.change, own - peak))
    return sorted(savings, key=lambda saving: saving.saved, reverse=True)[:MOST]


def _peak(recipe: Recipe, tokenizer: Any, micro_batch: Sequence[TokenizedExample]) -> int | None:
    found = Estimator(recipe, tokenizer, this_machine()).estimate(
        recipe.tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
    )
    return None if isinstance(found, Untraceable) else memory_per_gpu(found.job, Sharing()).peak


def variants(recipe: Recipe, micro_batch: Sequence[TokenizedExample]) -> Iterator[Variant]:
    """Every change of one key that could save memory."""
    train, model = recipe.train, recipe.model

    def with_train(change: str, **keys: Any) -> Variant:
        return Variant(change, _with(recipe, train=_with(train, **keys)), micro_batch)

    if not train.gradient_checkpointing:
        yield with_train("train.gradient_checkpointing=true", gradient_checkpointing=True)
    if train.batch_size > 1 and len(micro_batch) > 1:
        rows, steps = train.batch_size // 2, 2 * train.gradient_accumulation_steps
        halved = with_train(
            f"train.batch_size={rows} with train.gradient_accumulation_steps={steps}",
            batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        yield replace(halved, micro_batch=micro_batch[: -(-len(micro_batch) // 2)])
    if train.optimizer != "adafactor" and recipe.distributed.deepspeed is None:
        yield with_train("train.optimizer=adafactor", optimizer="adafactor")
    if recipe.tuning.kind in ("full", "freeze") and model.scratch is None:
        lora = _with(recipe, tuning=LoraTuning())
        yield Variant("tuning.kind=lora", lora, micro_batch)
    if choose_dtype(model.dtype) == torch.float32:
        half = _with(recipe, model=_with(model, dtype="bfloat16"))
        yield Variant("model.dtype=bfloat16", half, micro_batch)
    length = max(len(example.input_ids) for example in micro_batch) // 2
    cut = [_cut(example, length) for example in micro_batch]
    if all(any(label != IGNORE_INDEX for label in example.labels) for example in cut):
        yield Variant(f"data.max_length={length} with data.too_long=cut", recipe, cut)


def _with(section: Any, **keys: Any) -> Any:
    return section.model_copy(update=keys)


def _cut(example: TokenizedExample, length: int) -> TokenizedExample:
    return TokenizedExample(example.input_ids[:length], example.labels[:length], example.origin)
