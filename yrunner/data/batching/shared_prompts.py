"""Both answers of a pair behind one prompt, which is then computed once.

A stretch of a row begins with what both have in common, up to the token before the last one of the
prompt. Then comes each answer, with a copy of that last token, which predicts its first target. In
both, positions go on from the prompt. A mask lets an answer see the prompt and itself.
"""

# Shapes: B = rows, T = tokens

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from yrunner.data.batching.collate import lay_out
from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

COMMON = 0
"""The branch of the tokens that all answers of a stretch see."""
FILLING = -1
"""The stretch of padding."""


@dataclass(frozen=True)
class Stretch:
    """Adjacent tokens of a row: an answer with its prompt, or the answers of a pair with theirs."""

    example: TokenizedExample
    """All tokens, and their labels."""
    positions: list[int]
    branches: list[int]
    """COMMON, or the number of the answer from 1."""

    @classmethod
    def of(cls, answers: Sequence[TokenizedExample]) -> "Stretch":
        """The answers behind what they have in common."""
        common = count_common(answers)
        ids, labels = answers[0].input_ids[:common], [IGNORE_INDEX] * common
        positions, branches = [*range(common)], [COMMON] * common
        for number, answer in enumerate(answers, start=1):
            ids = ids + answer.input_ids[common:]
            labels = labels + answer.labels[common:]
            positions += range(common, len(answer.input_ids))
            branches += [number] * (len(answer.input_ids) - common)
        return cls(TokenizedExample(ids, labels, answers[0].origin), positions, branches)

    def shift_of(self, number: int) -> int:
        """How much later than in its own example the tokens of an answer are, counted from 0."""
        return sum(COMMON < branch <= number for branch in self.branches)


def count_common(answers: Sequence[TokenizedExample]) -> int:
    """Tokens that several answers have in common, less the one that predicts the first target."""
    if len(answers) < 2:
        return 0
    tokens = zip(*(answer.input_ids for answer in answers), strict=False)
    equal = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, tokens))
    return min(equal, *(answer.target_positions[0] - 1 for answer in answers))


def inputs_of_stretches(
    stretches: Sequence[Stretch], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """`position_ids`, shape [B, T], and `attention_mask`, shape [B, 1, T, T]: True for "sees"."""
    branches_BT = lay_out([stretch.branches for stretch in stretches], rows, COMMON)
    numbers = [[number] * len(stretch.branches) for number, stretch in enumerate(stretches)]
    stretch_BT = lay_out(numbers, rows, FILLING)
    is_common_BT1 = (branches_BT == COMMON)[:, None, :]
    sees_BTT = stretch_BT[:, :, None] == stretch_BT[:, None, :]
    sees_BTT &= is_common_BT1 | (branches_BT[:, :, None] == branches_BT[:, None, :])
    return {
        "position_ids": lay_out([stretch.positions for stretch in stretches], rows, 0),
        "attention_mask": sees_BTT.tril()[:, None],
    }
