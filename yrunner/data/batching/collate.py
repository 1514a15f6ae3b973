"""Collate examples to tensors, one or several examples per row.

A layout says which examples share a row. It never changes a result, only its cost: a loss is a sum
over targets, and examples in a row do not see each other. So it may differ from the packs of the
plan, which only decide what an update learns from. `python -m benchmarks.packing` compares them.
"""

# B = rows of a micro-batch, T = tokens of its longest row

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

from yrunner.data.batching.packing import pack
from yrunner.data.batching.token_batches import Slice, SlicedRow, cut_group
from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

BatchLayout = Callable[[Sequence[int]], list[list[int]]]
"""Maps the lengths of a micro-batch's examples to the examples of each row."""

WIDTHS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""Row widths that `fit_rows` tries, as multiples of the longest example."""


def one_per_row(lengths: Sequence[int]) -> list[list[int]]:
    """One padded example per row: correct for every causal model."""
    return [[example] for example in range(len(lengths))]


def all_in_one_row(lengths: Sequence[int]) -> list[list[int]]:
    """All examples in one row without padding: for attention with variable lengths."""
    return [list(range(len(lengths)))]


def fit_rows(lengths: Sequence[int], *, hidden_size: int) -> list[list[int]]:
    """Pack examples into rows: for attention that computes the whole square of a row.

    Wide rows need less padding, narrow rows less attention. Of WIDTHS, take the one with the least
    work: a layer multiplies each token by about 12 `hidden_size`^2 weights, and each pair of tokens
    of a row in 2 `hidden_size` products, so attention costs as much as the rest when a row is
    6 `hidden_size` wide.
    """

    def work(rows: list[list[int]]) -> float:
        width = max(sum(lengths[example] for example in row) for row in rows)
        return len(rows) * width * (1 + width / (6 * hidden_size))

    longest = max(lengths)
    return min((list(pack(lengths, int(longest * width))) for width in WIDTHS), key=work)


def choose_layout(attention: str, *, hidden_size: int, isolates: bool) -> BatchLayout:
    """The cheapest layout for an attention implementation, by its name in transformers.

    `isolates`: whether the model isolates examples in a row, see models/limits.py.
    """
    if not isolates:
        return one_per_row
    if attention.startswith("flash_attention"):
        return all_in_one_row
    return partial(fit_rows, hidden_size=hidden_size)


class SlicedExamples(Dataset[TokenizedExample]):
    """Examples by slice: an index and a group of its targets."""

    def __init__(self, examples: Sequence[TokenizedExample], token_batch: int = 0) -> None:
        self.examples = examples
        self.token_batch = token_batch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, one: Slice) -> TokenizedExample:
        example, group = one
        return cut_group(self.examples[example], group, self.token_batch)

    def __getitems__(self, rows: Sequence[SlicedRow]) -> list[TokenizedExample]:
        """All examples of a micro-batch, in one call of the data loader."""
        return [self[one] for row in rows for one in row]


def collate(
    examples: Sequence[TokenizedExample], pad_token_id: int, layout: BatchLayout = one_per_row
) -> dict[str, Tensor]:
    """`input_ids` and `labels` of a micro-batch, shape [B, T], and `position_ids` if needed.

    If examples share a row, `position_ids` restart at each example and each pad token. From that,
    without an `attention_mask` and with `use_cache=False`, transformers isolates the examples.
    Otherwise no mask is needed either: a causal model does not see padding on the right, and
    attention without a mask is faster.

    An empty micro-batch becomes one token without a target, because every update has the same
    number of micro-batches.
    """
    if not examples:
        return {
            "input_ids": torch.tensor([[pad_token_id]]),
            "labels": torch.tensor([[IGNORE_INDEX]]),
        }
    lengths = [len(example.input_ids) for example in examples]
    rows = layout(lengths)
    batch = {
        "input_ids": lay_out([example.input_ids for example in examples], rows, pad_token_id),
        "labels": lay_out([example.labels for example in examples], rows, IGNORE_INDEX),
    }
    if len(rows) < len(examples):
        batch["position_ids"] = lay_out([range(length) for length in lengths], rows, 0)
    return batch


def lay_out(parts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The parts of each row, concatenated and padded: shape [B, T]."""
    joined = [list(chain.from_iterable(parts[index] for index in row)) for row in rows]
    width = max(map(len, joined))
    return torch.tensor([row + [pad] * (width - len(row)) for row in joined])
