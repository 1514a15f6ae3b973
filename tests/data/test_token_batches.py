"""Every target is learned exactly once, in order, whatever the groups and the lanes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import example_of
from yrunner.data.conversation import TokenizedExample
from yrunner.data.token_batches import count_groups, count_updates, cut_group, walk_lanes
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

num_groups_of_examples = st.lists(st.integers(1, 9), max_size=25)


def walk_slowly(order, num_groups, num_lanes):
    """A queue per lane, filled anew whenever one is empty: one slice of each in every update."""
    waiting = [[(example, group) for group in range(num_groups[example])] for example in order]
    lanes = [[] for _ in range(num_lanes)]
    updates = []
    while True:
        for lane in lanes:
            if not lane and waiting:
                lane.extend(waiting.pop(0))
        if not any(lanes):
            return updates
        updates.append([lane.pop(0) for lane in lanes if lane])


@pytest.mark.parametrize("num_targets", [1, 9, 10, 11, 25])
@pytest.mark.parametrize("size", [0, 1, 10, 100])
def test_every_target_is_in_exactly_one_group(num_targets, size):
    example = example_of(3, num_targets)
    groups = [cut_group(example, group, size) for group in range(count_groups(num_targets, size))]
    learned = [label for group in groups for label in group.labels if label != IGNORE_INDEX]
    assert learned == [label for label in example.labels if label != IGNORE_INDEX]
    assert all(0 < len(group.target_positions) <= (size or num_targets) for group in groups)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_group_is_cut_behind_its_last_target(group):
    example = example_of(3, 25)
    cut = cut_group(example, group, 10)
    end = cut.target_positions[-1] + 1
    assert cut.input_ids == example.input_ids[:end]
    assert len(cut.labels) == end == min(3 + 10 * (group + 1), 28)
    assert cut.origin == example.origin


def test_groups_of_several_turns_reach_over_the_text_between_them():
    labels = [IGNORE_INDEX, 2, 3, IGNORE_INDEX, IGNORE_INDEX, 6, 7, IGNORE_INDEX]
    example = TokenizedExample([1, 2, 3, 4, 5, 6, 7, 8], labels, Origin("a", 1))
    first, second = (cut_group(example, group, 3) for group in range(count_groups(4, 3)))
    assert (first.labels, second.labels) == (labels[:6], [IGNORE_INDEX] * 6 + [7])
    assert second.input_ids == [1, 2, 3, 4, 5, 6, 7]


def test_without_token_batches_an_example_stays_as_it_is():
    example = example_of(3, 25)
    assert cut_group(example, 0, 0) is example


@settings(deadline=None)
@given(num_groups=num_groups_of_examples, num_lanes=st.integers(1, 8), data=st.data())
def test_lanes_walk_as_a_queue_for_each_would(num_groups, num_lanes, data):
    order = data.draw(st.permutations(range(len(num_groups))))
    assert list(walk_lanes(order, num_groups, num_lanes)) == walk_slowly(
        order, num_groups, num_lanes
    )


@settings(deadline=None)
@given(num_groups=num_groups_of_examples, num_lanes=st.integers(1, 8), data=st.data())
def test_every_group_comes_once_in_order_and_never_two_of_an_example_at_once(
    num_groups, num_lanes, data
):
    order = data.draw(st.permutations(range(len(num_groups))))
    updates = list(walk_lanes(order, num_groups, num_lanes))
    for example, number in enumerate(num_groups):
        walked = [group for update in updates for it, group in update if it == example]
        assert walked == list(range(number))
    for update in updates:
        assert 0 < len(update) <= num_lanes
        assert len({example for example, _ in update}) == len(update)
    began = [example for update in updates for example, group in update if group == 0]
    assert began == order


@settings(deadline=None)
@given(num_groups=num_groups_of_examples, num_lanes=st.integers(1, 8), data=st.data())
def test_updates_are_counted_without_walking(num_groups, num_lanes, data):
    order = data.draw(st.permutations(range(len(num_groups))))
    walked = list(walk_lanes(order, num_groups, num_lanes))
    assert count_updates(order, num_groups, num_lanes) == len(walked)
