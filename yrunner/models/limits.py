"""What a model cannot take: rows to predict, packed rows that it would mix, rows that are too long.

transformers isolates packed examples by their positions alone, which restart at each. A model that
ignores that (a state-space layer, custom attention) mixes them silently. An encoder loads as a
causal model, and sees the tokens that it should predict. So both are tried out, not looked up in a
list.
"""

# Shapes: T = tokens, V = vocabulary, D = hidden size

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from yrunner.errors import DataError, MissingError, ModelError, Origin
from yrunner.losses.vocabulary_layers import (
    base_embeddings,
    base_head,
    count_embeddings,
    trains_row,
)
from yrunner.models.quantization import local_file, read_dict

PROBE_LENGTH = 12
"""Tokens of each example in the trial: longer than the kernels of short convolutions."""
SAME = 1e-5
"""Relative difference of logits up to which rounding may be the reason."""
OF_EIGHT_BITS = 2e-2
"""The same in 8 bits, where the largest inputs of all tokens decide how each is rounded."""
NEAR_ZERO = 1e-2
"""Share of the usual length, or of the usual distance to the mean, that no learned row is below."""
OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
)
"""Ends of `architectures` in a config.json that say what else a model was trained for."""
OF_EMBEDDING_MODELS = ("modules.json", "config_sentence_transformers.json")
"""Files that sentence-transformers writes."""
FIRST_NUMBERS = 8
"""Of a row, which are compared first."""
SAMPLED_ROWS = 4096
"""Rows of a vocabulary that say what is usual."""


def check_purpose(source: str) -> None:
    """Raise `ModelError` for a classifier or an embedding model, by the files beside its weights.

    Such a model can load as a language model: its own head is left out, another one is tied.
    """
    config_file = local_file(source, "config.json")
    config = {} if config_file is None else read_dict(config_file)
    named = config.get("architectures")
    kind = str(named[0]) if isinstance(named, list) and named else ""
    if local_file(source, "modules.json") or local_file(
        source, "config_sentence_transformers.json"
    ):
        what = "an embedding model"
    elif kind.endswith(OTHER_HEADS) and not config.get("is_decoder"):
        what = f"a {kind}"
    else:
        return
    raise ModelError(
        f"the base {source} is {what}, which does not predict the next token",
        remedy="use the language model that it was made from",
    )


def check_causal(model: Any) -> None:
    """Raise `ModelError` if a model sees the tokens that it should predict."""
    if is_causal(model):
        return
    config = model.config
    remedy = "choose a model that generates text from left to right, such as Qwen3"
    if getattr(config, "is_decoder", None) is False:
        remedy += "; if this one was trained as a decoder, set is_decoder in its config.json"
    raise ModelError(
        f"the {config.model_type} model {config.name_or_path} sees the tokens that it should "
        "predict, so it cannot be trained or scored as a language model",
        remedy=remedy,
    )


def is_causal(model: Any) -> bool:
    """Whether no token changes the logits before it.

    One short forward pass, in the model's precision and on its device: the second token of a row is
    changed, which shows a prefix that is read both ways, one in the middle, and the last. Where
    these rows differ, each is computed by itself, because the rows of a batch may be rounded
    differently.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = count_embeddings(model)
    row = torch.randint(vocabulary_size, (PROBE_LENGTH,), generator=generator).tolist()
    places = (1, PROBE_LENGTH // 2, PROBE_LENGTH - 1)
    rows = [[*row[:at], (row[at] + 1) % vocabulary_size, *row[at + 1 :]] for at in places]
    with evaluating(model):
        before_TV, *after = _logits_of_rows(model, [row, *rows])
        if _leak(before_TV, after, places) <= SAME:
            return True
        before_TV, *after = (_logits_of_rows(model, [each])[0] for each in (row, *rows))
    allowed = SAME
    if _has_experts(model):
        allowed = max(SAME, _precision(model, before_TV))  # each gets other tokens now
    if getattr(model, "is_loaded_in_8bit", False):
        allowed = OF_EIGHT_BITS
    return _leak(before_TV, after, places) <= allowed


def _leak(before_TV: Tensor, after: Sequence[Tensor], places: Sequence[int]) -> float:
    """By how much the logits before a changed token differ at most."""
    pairs = zip(after, places, strict=True)
    return max(_relative_difference(before_TV[:at], after_TV[:at]) for after_TV, at in pairs)


def can_be_tried(model: Any) -> bool:
    """Whether a model that was just loaded can run where it is."""
    needs_gpu = "flash" in str(model.config.get_text_config()._attn_implementation)
    return not is_deepspeed_zero3_enabled() and not (needs_gpu and model.device.type == "cpu")


def require_flash_attention() -> None:
    """Raise `MissingError` without the package that model.attention flash_attention_2 needs."""
    if not is_flash_attn_2_available() and find_spec("kernels") is None:
        raise MissingError(
            "model.attention flash_attention_2 needs a GPU and the package flash-attn",
            remedy="run pip install flash-attn, or set model.attention: sdpa",
        )


def check_isolation(model: Any) -> None:
    """Raise `ModelError` if the model mixes the examples of a packed row."""
    if not isolates_examples(model):
        raise ModelError(
            f"data.packing: this {model.config.model_type} model with "
            f"{model.config._attn_implementation} attention mixes the examples of a row",
            remedy="set data.packing to false, or try another model.attention",
        )


def isolates_examples(model: Any) -> bool:
    """Whether an example's logits are the same alone and after any other example.

    Three short forward passes, in the model's precision and on its device.
    """
    vocabulary_size = count_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(
        vocabulary_size, (3, PROBE_LENGTH), generator=generator
    ).tolist()
    try:
        with evaluating(model):
            alone_TV = _last_logits(model, [second])
            after_first_TV = _last_logits(model, [first, second])
            after_other_TV = _last_logits(model, [other, second])
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return False  # nothing else could isolate the examples
    precision = _precision(model, alone_TV)
    # Rounding within a row is always the same, except where experts get other tokens.
    leak = _relative_difference(after_first_TV, after_other_TV)
    change = _relative_difference(after_first_TV, alone_TV)
    return leak <= (precision if _has_experts(model) else 0.0) and change <= precision**0.5


def branches_at_a_mask(model: Any) -> bool:
    """Whether an answer's logits are the same behind its prompt alone, and where another answer to
    that prompt stands between, which a mask hides.

    Three short forward passes. Only attention of torch takes such a mask; layers that see a window
    of the tokens would lose it, which short rows do not show.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or has_windows(config):
        return False
    vocabulary_size = count_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    prompt, other, another, answer = torch.randint(
        vocabulary_size, (4, PROBE_LENGTH), generator=generator
    ).tolist()
    try:
        with evaluating(model):
            alone_TV = _last_logits(model, [prompt + answer])[PROBE_LENGTH:]
            after_other_TV = _logits_of_branch(model, prompt, other, answer)
            after_another_TV = _logits_of_branch(model, prompt, another, answer)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it has no place for such a mask
    precision = _precision(model, alone_TV)
    leak = _relative_difference(after_other_TV, after_another_TV)
    change = _relative_difference(after_other_TV, alone_TV)
    return leak <= (precision if _has_experts(model) else 0.0) and change <= precision**0.5


def has_windows(config: Any) -> bool:
    """Whether a layer sees only a part of the tokens before."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return {*kinds} != {"full_attention"}
    return bool(getattr(config, "sliding_window", None)) or bool(
        getattr(config, "attention_chunk_size", None)
    )


def _logits_of_branch(
    model: Any, prompt: Sequence[int], other: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits of an answer where another one to its prompt stands between, [T, V]."""
    first, second = len(prompt), len(prompt) + len(other)
    row = [*prompt, *other, *answer]
    positions = [*range(second), *range(first, first + len(answer))]
    sees = torch.ones(len(row), len(row), dtype=torch.bool).tril()
    sees[second:, first:second] = False
    inputs = {
        "input_ids": torch.tensor([row]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": sees[None, None],
    }
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, second:].cpu()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off in the block, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _logits_of_rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits of rows of one length, [rows, T, V]."""
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=torch.tensor(rows).to(model.device), use_cache=False
        ).logits
    return logits.cpu()


def _last_logits(model: Any, examples: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the last of the examples, packed into one row as `collate` does it, [T, V]."""
    inputs = {"input_ids": torch.tensor([list(chain.from_iterable(examples))])}
    if len(examples) > 1:
        positions = chain.from_iterable(range(len(example)) for example in examples)
        inputs["position_ids"] = torch.tensor([list(positions)])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        logits_TV = model(**inputs, use_cache=False).logits[0, -len(examples[-1]) :]
    return logits_TV.cpu()


def _precision(model: Any, logits_TV: Tensor) -> float:
    """Relative precision of the coarsest dtype on the way to the logits."""
    dtypes = {logits_TV.dtype, model.dtype}
    if torch.is_autocast_enabled(model.device.type):
        dtypes.add(torch.get_autocast_dtype(model.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _has_experts(model: Any) -> bool:
    return any("experts" in key for key in model.config.get_text_config().to_dict())


def _relative_difference(logits_TV: Tensor, other_TV: Tensor) -> float:
    """Norm of the difference relative to the logits, both centred."""
    mine_TV = logits_TV.double() - logits_TV.double().mean(dim=-1, keepdim=True)
    theirs_TV = other_TV.double() - other_TV.double().mean(dim=-1, keepdim=True)
    return float((mine_TV - theirs_TV).norm() / mine_TV.norm())


Lengths = Sequence[int] | NDArray[np.integer[Any]]


def check_lengths(lengths: Lengths, origin: Callable[[int], Origin], config: Any) -> None:
    """Raise `DataError` if the longest row has more tokens than the model has positions.

    `lengths`: of all rows; `origin`: the origin of a row by its index.
    """
    positions = count_positions(config)
    if positions is None or not len(lengths):
        return
    longest = int(np.argmax(lengths))
    if lengths[longest] > positions:
        raise DataError(
            origin(longest),
            f"{lengths[longest]:,} tokens, and the model has {positions:,} positions",
            remedy=f"set data.max_length to {positions}; data.too_long decides what happens "
            "to longer rows",
        )


def max_positions(model: Any) -> int:
    """The model's longest sequence in tokens; a huge number where its config sets no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def count_positions(config: Any) -> int | None:
    """Positions that a model was trained or stretched to; None if it has no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    learned = rope.get("original_max_position_embeddings", positions)
    return max(positions, int(learned * rope.get("factor", 1)))


@dataclass(frozen=True)
class UnlearnedRow:
    """A row of embeddings or output head that the base has never learned."""

    token_id: int
    part: str
    """`embeddings` or `output head`."""
    why: str

    def __str__(self) -> str:
        return f"its row in the {self.part} {self.why}"


def unlearned_rows(
    model: Any, read_ids: Iterable[int], written_ids: Iterable[int]
) -> list[UnlearnedRow]:
    """Rows that the base has never learned and that training leaves as they are.

    `model`: before its first update, ready to train. `read_ids`: tokens of the inputs, which need
    an embedding; `written_ids`: targets, which need a row of the head. Weights that other processes
    hold (ZeRO-3) are not looked at.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [("embeddings", embeddings, base_embeddings(model), read_ids)]
    if head is not None:
        parts.append(("output head", head, base_head(model), written_ids))
    found = []
    for part, layer, base, token_ids in parts:
        frozen = [token_id for token_id in token_ids if not trains_row(layer, token_id)]
        for token_id, why in _unlearned(base.weight.detach(), frozen).items():
            found.append(UnlearnedRow(token_id, part, why))
    return found


def _count_rows(weight_VD: Tensor, row_D: Tensor) -> int:
    """How many rows are this one; its first numbers tell most others apart."""
    likely_V = (weight_VD[:, :FIRST_NUMBERS] == row_D[:FIRST_NUMBERS]).all(dim=1)
    return int((weight_VD[likely_V] == row_D).all(dim=1).sum())


def _unlearned(weight_VD: Tensor, token_ids: Sequence[int]) -> dict[int, str]:
    """What shows that a row was never learned: zero, equal to another, or the mean of all."""
    token_ids = [token_id for token_id in token_ids if token_id < len(weight_VD)]
    if not token_ids or weight_VD.ndim != 2 or not weight_VD.is_floating_point():
        return {}
    # In parts: in float32 all of them could be larger than the model.
    parts = torch.split(weight_VD, SAMPLED_ROWS)
    mean_D = torch.stack([part.float().sum(dim=0) for part in parts]).sum(dim=0) / len(weight_VD)
    few_VD = weight_VD[:: max(1, len(weight_VD) // SAMPLED_ROWS)].float()
    length = float(few_VD.norm(dim=1).median())
    distance = float((few_VD - mean_D).norm(dim=1).median())
    found = {}
    for token_id in token_ids:
        row_D = weight_VD[token_id]
        if float(row_D.float().norm()) <= NEAR_ZERO * length:
            found[token_id] = "is zero"
        elif _count_rows(weight_VD, row_D) > 1:
            found[token_id] = "is the same as that of another token"
        elif float((row_D.float() - mean_D).norm()) <= NEAR_ZERO * distance:
            found[token_id] = "is the mean of all rows"
    return found
