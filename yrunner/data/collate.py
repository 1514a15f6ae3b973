"""Examples to tensors: rows of one example or of several, whose positions restart at each."""

# B = rows of a micro-batch, T = tokens of its longest row

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

from yrunner.data.conversation import TokenizedExample
from yrunner.data.layouts import Layout, one_per_row
from yrunner.data.token_batches import Row, Slice, cut_group
from yrunner.tokens import IGNORE_INDEX


class SlicedExamples(Dataset[TokenizedExample]):
    """Examples, asked for by slice: an index and a group of its targets."""

    def __init__(self, examples: Sequence[TokenizedExample], token_batch: int = 0) -> None:
        self.examples = examples
        self.token_batch = token_batch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Slice) -> TokenizedExample:
        example, group = place
        return cut_group(self.examples[example], group, self.token_batch)

    def __getitems__(self, rows: Sequence[Row]) -> list[TokenizedExample]:
        """All examples of a micro-batch, as the data loader asks for them."""
        return [self[place] for row in rows for place in row]


def collate(
    examples: Sequence[TokenizedExample], pad_token_id: int, layout: Layout = one_per_row
) -> dict[str, Tensor]:
    """`input_ids` and `labels` of a micro-batch, each of shape [B, T], and what isolates examples.

    Where examples share a row, `position_ids` restart at each of them, and at every pad. From that
    alone, without `attention_mask` and with `use_cache=False`, transformers knows that they must
    not see each other. Otherwise no mask is needed either: padding stands on the right, where a
    causal model does not look, and attention without a mask is faster.

    An empty micro-batch becomes one token without a target: the update it belongs to was filled
    by the others, and every update has the same number of micro-batches.
    """
    if not examples:
        return {
            "input_ids": torch.tensor([[pad_token_id]]),
            "labels": torch.tensor([[IGNORE_INDEX]]),
        }
    lengths = [len(example.input_ids) for example in examples]
    rows = layout(lengths)
    batch = {
        "input_ids": _lay_out([example.input_ids for example in examples], rows, pad_token_id),
        "labels": _lay_out([example.labels for example in examples], rows, IGNORE_INDEX),
    }
    if len(rows) < len(examples):
        batch["position_ids"] = _lay_out([range(length) for length in lengths], rows, 0)
    return batch


def _lay_out(parts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The parts of each row one behind the other, filled up with `pad`: shape [B, T]."""
    joined = [list(chain.from_iterable(parts[index] for index in row)) for row in rows]
    width = max(map(len, joined))
    return torch.tensor([row + [pad] * (width - len(row)) for row in joined])
