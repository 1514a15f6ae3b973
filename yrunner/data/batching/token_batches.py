"""Token batches: train on a reply in groups of N targets, one group per optimizer update.

The loss that sets a token's weight is then computed after training on the groups before it. Later
tokens do not change the loss of a group in a causal model, so they are cut off.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence

from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

Slice = tuple[int, int]
"""The index of an example, and of one of its groups."""
SlicedRow = tuple[Slice, ...]
"""The content of a row of a micro-batch: one slice, or one slice per example of a pack."""


def count_groups(num_targets: int, size: int) -> int:
    """Number of groups of `size` targets; the last may be short. Size 0 means one group."""
    if size == 0:
        return 1
    return -(-num_targets // size)


def count_targets(num_targets: int, group: int, size: int) -> int:
    """Number of targets in one group of an example with `num_targets`."""
    return num_targets if size == 0 else min(size, num_targets - group * size)


def cut_group(example: TokenizedExample, group: int, size: int) -> TokenizedExample:
    """The example up to the last target of a group; only the targets of the group have labels."""
    if size == 0:
        return example
    targets = example.target_positions[group * size : (group + 1) * size]
    end = targets[-1] + 1
    labels = [IGNORE_INDEX] * end
    for position in targets:
        labels[position] = example.labels[position]
    return TokenizedExample(example.input_ids[:end], labels, example.origin)


def balance_lanes(
    order: Sequence[int], num_groups: Sequence[int], num_lanes: int
) -> list[list[int]]:
    """Assign examples to lanes of similar total length, in the given order within each lane.

    Longest first, each example goes to the lane with the least work (Graham, 1969). A random order
    stays random within every lane.
    """
    lane_of: dict[int, int] = {}
    loads = [(0, lane) for lane in range(num_lanes)]
    for example in sorted(order, key=num_groups.__getitem__, reverse=True):
        load, lane_of[example] = loads[0]
        heapq.heapreplace(loads, (load + num_groups[example], lane_of[example]))
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    for example in order:
        lanes[lane_of[example]].append(example)
    return lanes


def walk_lanes(queues: Sequence[Iterator[int]], num_groups: Sequence[int]) -> Iterator[list[Slice]]:
    """Yield the slices of each update, one per lane.

    A lane takes the groups of an example one by one, then the next example of its queue: so an
    update never has two groups of one example, and groups keep their order. If lanes share a queue,
    examples start in its order. Lanes that run out make the updates shorter.
    """
    lanes = [_walk_lane(queue, num_groups) for queue in queues]
    while update := [one for lane in lanes if (one := next(lane, None)) is not None]:
        yield update


def _walk_lane(queue: Iterator[int], num_groups: Sequence[int]) -> Iterator[Slice]:
    for example in queue:
        for group in range(num_groups[example]):
            yield example, group


def count_updates(numbers: Iterable[int], num_lanes: int) -> int:
    """Number of updates of lanes that share a queue of examples with these numbers of groups.

    Sorted from large to small, also that of the lanes of `balance_lanes`.
    """
    ends = [0] * num_lanes
    for number in numbers:
        heapq.heapreplace(ends, ends[0] + number)
    return max(ends)
