"""Token batches: a response is learned in groups of N targets, one group per optimizer update.

The loss that sets a token's weight then already knows the groups before it. A causal model gives
the same loss for a group whether or not later tokens are present, so those are cut off.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice

from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

Slice = tuple[int, int]
"""An example's index, and which of its groups."""
Row = tuple[Slice, ...]
"""What a row of a micro-batch is made of: one slice, or one of each example of a pack."""


def count_groups(num_targets: int, size: int) -> int:
    """Groups that `num_targets` are cut into; the last may be short. Size 0: all in one group."""
    if size == 0:
        return 1
    return -(-num_targets // size)


def cut_group(example: TokenizedExample, group: int, size: int) -> TokenizedExample:
    """The example up to the last target of its group number `group`; only the group is learned."""
    if size == 0:
        return example
    targets = example.target_positions[group * size : (group + 1) * size]
    end = targets[-1] + 1
    labels = [IGNORE_INDEX] * end
    for place in targets:
        labels[place] = example.labels[place]
    return TokenizedExample(example.input_ids[:end], labels, example.origin)


def walk_lanes(
    order: Sequence[int], num_groups: Sequence[int], num_lanes: int
) -> Iterator[list[Slice]]:
    """Yield, update by update, what each lane learns from.

    A lane walks through one example group by group and then takes the next example of `order`, so
    that two groups of one example never meet in an update and their order holds. `num_groups` is
    per example. Towards the end, lanes run out and the updates get shorter.
    """
    waiting = iter(order)
    lanes: list[Slice] = [(example, 0) for example in islice(waiting, num_lanes)]
    while lanes:
        yield lanes
        following: list[Slice] = []
        for example, group in lanes:
            if group + 1 < num_groups[example]:
                following.append((example, group + 1))
            elif (fresh := next(waiting, None)) is not None:
                following.append((fresh, 0))
        lanes = following


def count_updates(order: Sequence[int], num_groups: Sequence[int], num_lanes: int) -> int:
    """How many updates `walk_lanes` yields, without walking them: each lane is a queue."""
    ends = [0] * num_lanes
    for example in order:
        heapq.heapreplace(ends, ends[0] + num_groups[example])
    return max(ends)
