"""Every target is learned exactly once, in order, whatever the groups and the lanes."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tests.data.conftest import example_of
from yrunner.data.batching.token_batches import (
    balance_lanes,
    count_groups,
    count_updates,
    cut_group,
    walk_lanes,
)
from yrunner.data.conversation import TokenizedExample
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


def share(order, num_groups, num_lanes):
    """Updates of lanes that share a queue."""
    return list(walk_lanes([iter(order)] * num_lanes, num_groups))


def balance(order, num_groups, num_lanes):
    """Updates of lanes that end together."""
    lanes = balance_lanes(order, num_groups, num_lanes)
    return list(walk_lanes([iter(lane) for lane in lanes], num_groups))


def idle_share(updates, num_lanes):
    """Share of the places of all updates that no lane fills."""
    return 1 - sum(map(len, updates)) / (num_lanes * len(updates))


def like_instruction_data(seed):
    """Groups of a thousand examples, log-normal: half of them up to eight, the longest about 70."""
    generator = random.Random(seed)
    return [max(1, round(generator.lognormvariate(2.1, 0.7))) for _ in range(1000)]


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


@pytest.mark.parametrize("group", [0, 1, 2])
def test_what_follows_a_group_changes_neither_its_losses_nor_its_gradient(make_model, group):
    model, example = make_model(), example_of(3, 25)

    def learn(ids, places):
        model.zero_grad()
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
        labels_N = torch.tensor([ids[place] for place in places])
        loss_N = cross_entropy(
            logits_TV[[place - 1 for place in places]], labels_N, reduction="none"
        )
        loss_N.sum().backward()
        return loss_N, [parameter.grad.clone() for parameter in model.parameters()]

    cut = cut_group(example, group, 10)
    whole = learn(example.input_ids, cut.target_positions)
    torch.testing.assert_close(learn(cut.input_ids, cut.target_positions), whole)


def test_without_token_batches_an_example_stays_as_it_is():
    example = example_of(3, 25)
    assert cut_group(example, 0, 0) is example


any_lanes = given(num_groups=num_groups_of_examples, num_lanes=st.integers(1, 8), data=st.data())


@any_lanes
def test_lanes_that_share_a_queue_walk_as_one_for_each_would(num_groups, num_lanes, data):
    order = data.draw(st.permutations(range(len(num_groups))))
    updates = share(order, num_groups, num_lanes)
    assert updates == walk_slowly(order, num_groups, num_lanes)
    assert [example for update in updates for example, group in update if group == 0] == order


@pytest.mark.parametrize("schedule", [share, balance])
@any_lanes
def test_every_group_comes_once_in_order_and_never_two_of_an_example_at_once(
    schedule, num_groups, num_lanes, data
):
    order = data.draw(st.permutations(range(len(num_groups))))
    updates = schedule(order, num_groups, num_lanes)
    for example, number in enumerate(num_groups):
        walked = [group for update in updates for it, group in update if it == example]
        assert walked == list(range(number))
    for update in updates:
        assert 0 < len(update) <= num_lanes
        assert len({example for example, _ in update}) == len(update)


@any_lanes
def test_updates_are_counted_without_walking(num_groups, num_lanes, data):
    order = data.draw(st.permutations(range(len(num_groups))))
    in_order = [num_groups[example] for example in order]
    assert count_updates(in_order, num_lanes) == len(share(order, num_groups, num_lanes))
    falling = sorted(num_groups, reverse=True)
    assert count_updates(falling, num_lanes) == len(balance(order, num_groups, num_lanes))


@any_lanes
def test_balanced_lanes_keep_the_order_and_differ_by_one_example_at_the_most(
    num_groups, num_lanes, data
):
    order = data.draw(st.permutations(range(len(num_groups))))
    lanes = balance_lanes(order, num_groups, num_lanes)
    assert sorted(example for lane in lanes for example in lane) == sorted(order)
    places = [[order.index(example) for example in lane] for lane in lanes]
    assert places == [sorted(lane) for lane in places]
    loads = [sum(num_groups[example] for example in lane) for lane in lanes]
    for lane, load in zip(lanes, loads, strict=True):
        assert load - min(loads) <= min((num_groups[example] for example in lane), default=0)


@any_lanes
def test_balanced_lanes_of_examples_with_one_group_take_turns(num_groups, num_lanes, data):
    order = data.draw(st.permutations(range(len(num_groups))))
    ones = [1] * len(num_groups)
    assert balance(order, ones, num_lanes) == share(order, ones, num_lanes)


@pytest.mark.parametrize("num_lanes", [4, 16, 64])
def test_balanced_lanes_end_together(num_lanes):
    for seed in range(5):
        num_groups = like_instruction_data(seed)
        order = random.Random(seed).sample(range(1000), 1000)
        assert idle_share(balance(order, num_groups, num_lanes), num_lanes) < 0.007


def test_updates_are_counted_without_walking_them():
    assert count_updates([10**15] * 128, 64) == 2 * 10**15
