"""Examples to tensors: padded on the right to the longest of the micro-batch."""

# B = examples of a micro-batch, T = tokens of its longest example

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from yrunner.data.conversation import TokenizedExample
from yrunner.data.token_batches import Slice, cut_group
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


def collate(examples: Sequence[TokenizedExample], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of a micro-batch, each of shape [B, T].

    An empty micro-batch becomes one token without a target: the update it belongs to was filled
    by the others, and every update has the same number of micro-batches.
    """
    rows = [(example.input_ids, example.labels) for example in examples]
    rows = rows or [([pad_token_id], [IGNORE_INDEX])]
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), longest)
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        attention_mask_BT[row, : len(ids)] = 1
    return {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "labels": labels_BT,
    }
