"""Token batches: a response is learned in groups of N targets, one group per optimizer update.

The loss that sets a token's weight then already knows the groups before it. A causal model gives
the same loss for a group whether or not later tokens are present, so those are cut off.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence

from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

Slice = tuple[int, int]
"""An example's index, and which of its groups."""
SlicedRow = tuple[Slice, ...]
"""What a row of a micro-batch is made of: one slice, or one of each example of a pack."""


def count_groups(num_targets: int, size: int) -> int:
    """Groups that `num_targets` are cut into; the last may be short. Size 0: all in one group."""
    if size == 0:
        return 1
    return -(-num_targets // size)


def count_targets(num_targets: int, group: int, size: int) -> int:
    """Targets in group number `group` of an example with so many."""
    return num_targets if size == 0 else min(size, num_targets - group * size)


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


def balance_lanes(
    order: Sequence[int], num_groups: Sequence[int], num_lanes: int
) -> list[list[int]]:
    """The examples of each lane, so that all lanes end together; within each, `order` holds.

    Longest first, each example goes to the lane that has the least to do (Graham, 1969). This
    settles only who shares a lane: an order that is random stays so in every lane.
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
    """Yield, update by update, what each lane learns from.

    A lane walks through one example group by group and then takes the next one of its queue, so
    that two groups of one example never meet in an update and their order holds. Lanes can share a
    queue: then examples are begun in its order. Lanes that run out make the updates shorter.
    """
    lanes = [_walk_lane(queue, num_groups) for queue in queues]
    while update := [place for lane in lanes if (place := next(lane, None)) is not None]:
        yield update


def _walk_lane(queue: Iterator[int], num_groups: Sequence[int]) -> Iterator[Slice]:
    for example in queue:
        for group in range(num_groups[example]):
            yield example, group


def count_updates(numbers: Iterable[int], num_lanes: int) -> int:
    """Updates of lanes that share a queue of examples with so many groups, without walking them.

    From the greatest number to the least, those of `balance_lanes` too.
    """
    ends = [0] * num_lanes
    for number in numbers:
        heapq.heapreplace(ends, ends[0] + number)
    return max(ends)
