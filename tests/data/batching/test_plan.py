"""The plan holds every target once an epoch, and knows its own length."""

from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import example_of
from yrunner.data.batching.collate import SlicedExamples
from yrunner.data.batching.plan import epoch_after, make_plan
from yrunner.tokens import IGNORE_INDEX


def plan_of(num_targets, **changes):
    choices = {
        "token_batch": 0,
        "batch_size": 2,
        "accumulation": 2,
        "epochs": 1,
        "max_updates": None,
        "order": "shuffle",
        "seed": 1,
    }
    return make_plan(num_targets, **{**choices, **changes})


def choices_of_a_run(**fixed):
    choices = {
        "token_batch": st.sampled_from([0, 1, 2, 3, 7, 50]),
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "order": st.sampled_from(["shuffle", "as_written"]),
        "seed": st.integers(0, 9),
    }
    return st.fixed_dictionaries({**choices, **fixed})


numbers_of_targets = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(num_targets=numbers_of_targets, choices=choices_of_a_run())
def test_every_target_is_trained_exactly_once_an_epoch(num_targets, choices):
    examples = [example_of(2, number) for number in num_targets]
    plan = plan_of(num_targets, **choices)
    slices = SlicedExamples(examples, choices["token_batch"])
    learned = Counter(
        (place[0], label)
        for micro_batch in plan
        for row in micro_batch
        for place in row
        for label in slices[place].labels
        if label != IGNORE_INDEX
    )
    expected = {
        (index, label)
        for index, example in enumerate(examples)
        for label in example.labels
        if label != IGNORE_INDEX
    }
    assert learned == dict.fromkeys(expected, choices["epochs"])


@given(
    num_targets=numbers_of_targets,
    choices=choices_of_a_run(max_updates=st.none() | st.integers(1, 60)),
)
def test_the_number_of_micro_batches_is_exact(num_targets, choices):
    plan = plan_of(num_targets, **choices)
    micro_batches = list(plan)
    assert len(micro_batches) == plan.num_updates * choices["accumulation"]
    assert all(len(it) <= choices["batch_size"] for it in micro_batches)
    size = choices["accumulation"]
    for number, update in enumerate(plan.updates()):
        joined = list(chain(*micro_batches[number * size : (number + 1) * size]))
        assert joined == update
        assert update, "no update is empty"
        assert len({example for ((example, _),) in update}) == len(update)


@given(num_targets=numbers_of_targets, choices=choices_of_a_run())
def test_epochs_end_where_every_target_was_seen_as_often(num_targets, choices):
    plan = plan_of(num_targets, **choices)
    assert len(plan.epoch_ends) == choices["epochs"]
    assert plan.epoch_ends[-1] == plan.num_updates
    updates, start = list(plan.updates()), 0
    for end in plan.epoch_ends:
        slices = [place for update in updates[start:end] for place in update]
        assert len(slices) == len(set(slices)) == sum(plan.num_groups)
        start = end


@given(num_targets=numbers_of_targets, choices=choices_of_a_run(max_updates=st.integers(1, 60)))
def test_a_run_that_ends_early_is_the_beginning_of_the_whole_one(num_targets, choices):
    short = plan_of(num_targets, **choices)
    whole = plan_of(num_targets, **{**choices, "max_updates": None})
    assert short.num_updates == min(whole.num_updates, choices["max_updates"])
    part = list(short)
    assert part == list(whole)[: len(part)]


def test_without_epochs_the_run_goes_on_until_max_updates():
    plan = plan_of([1] * 10, epochs=None, max_updates=25)
    assert plan.num_updates == len(list(plan.updates())) == 25
    assert plan.epoch_ends == [3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_as_written_takes_the_examples_in_the_order_of_the_file():
    plan = plan_of([5] * 7, order="as_written", epochs=2)
    assert (
        list(plan)
        == [
            [((0, 0),), ((1, 0),)],
            [((2, 0),), ((3, 0),)],
            [((4, 0),), ((5, 0),)],
            [((6, 0),)],
        ]
        * 2
    )


def test_where_examples_run_out_the_last_micro_batches_are_short_or_empty():
    plan = plan_of([25, 1], token_batch=10, order="as_written", accumulation=3)
    micro_batches = [[((0, 0),), ((1, 0),)], [], [], [((0, 1),)], [], [], [((0, 2),)], [], []]
    assert list(plan) == micro_batches


def test_groups_of_an_example_stay_in_order_beside_other_examples():
    plan = plan_of([3, 1, 2], token_batch=1, order="as_written", batch_size=2, accumulation=1)
    assert list(plan) == [
        [((0, 0),), ((1, 0),)],
        [((0, 1),), ((2, 0),)],
        [((0, 2),), ((2, 1),)],
    ]


@given(num_targets=numbers_of_targets, choices=choices_of_a_run(order=st.just("shuffle")))
def test_shuffled_lanes_end_within_one_example_of_each_other(num_targets, choices):
    plan = plan_of(num_targets, **choices)
    sizes = {b - a for a, b in pairwise([0, *plan.epoch_ends])}
    assert len(sizes) == 1, "every epoch is equally long"
    even = -(-sum(plan.num_groups) // plan.lanes)
    assert even <= sizes.pop() < even + max(plan.num_groups)


def test_the_same_seed_gives_the_same_plan_and_another_another():
    def order(seed, epoch):
        return plan_of([1] * 50, seed=seed, epochs=2).example_order(epoch)

    assert list(plan_of([1] * 50)) == list(plan_of([1] * 50))
    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert order(1, 0) == orders[0]
    assert len({tuple(it) for it in orders}) == 4
    assert all(sorted(it) == list(range(50)) for it in orders)


lengths_of_examples = st.lists(st.integers(1, 20), min_size=1, max_size=30)


@given(lengths=lengths_of_examples, choices=choices_of_a_run(token_batch=st.just(0)))
def test_packed_every_example_is_learned_once_an_epoch_and_the_updates_are_counted(
    lengths, choices
):
    plan = plan_of([1] * len(lengths), lengths=lengths, pack_to=20, **choices)
    updates = list(plan.updates())
    assert plan.num_updates == len(updates) == plan.epoch_ends[-1]
    assert len(list(plan)) == plan.num_updates * plan.num_micro_batches
    start = 0
    for end in plan.epoch_ends:
        rows = [row for update in updates[start:end] for row in update]
        learned = sorted(place for row in rows for place in row)
        assert learned == [(example, 0) for example in range(len(lengths))]
        assert all(sum(lengths[example] for example, _ in row) <= 20 for row in rows)
        # Rows are missing in the last update of an epoch only.
        sizes = [len(update) for update in updates[start:end]]
        assert sizes[:-1] == [plan.lanes] * (len(sizes) - 1)
        start = end
    assert len({*(b - a for a, b in pairwise([0, *plan.epoch_ends]))}) == 1


def test_packed_as_written_only_neighbours_share_a_row():
    plan = plan_of(
        [1] * 6, lengths=[3, 7, 4, 1, 9, 2], pack_to=10, order="as_written", epochs=2, batch_size=1
    )
    rows = [[example for example, _ in row] for update in plan.updates() for row in update]
    assert rows == [[0, 1], [2, 3], [4], [5]] * 2


def test_every_epoch_and_every_seed_has_other_packs():
    def packs(seed, epoch):
        plan = plan_of([1] * 60, lengths=[*range(1, 21)] * 3, pack_to=20, seed=seed, epochs=2)
        return list(plan.packs_of(epoch))

    assert packs(1, 0) == packs(1, 0)
    different = [packs(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(it) for it in different}) == 4


def test_by_length_the_rows_of_an_update_are_dealt_out_to_its_micro_batches():
    plan = plan_of([1] * 4, lengths=[2, 9, 3, 8], order="as_written")
    assert list(plan) == [[((1, 0),), ((3, 0),)], [((2, 0),), ((0, 0),)]]


def test_by_length_a_group_counts_up_to_its_last_target():
    plan = plan_of([20, 5], lengths=[22, 10], token_batch=5, order="as_written", batch_size=1)
    assert next(iter(plan)) == [((1, 0),)], "of the longer example, seven tokens are left"


def test_a_token_batch_cannot_be_packed():
    with pytest.raises(AssertionError, match="not cut into groups"):
        plan_of([3], lengths=[5], pack_to=10, token_batch=2)


@pytest.mark.parametrize("num_targets", [[], [3, 0]])
def test_a_plan_without_targets_is_never_made(num_targets):
    with pytest.raises(AssertionError, match="without targets"):
        plan_of(num_targets)


@pytest.mark.parametrize(("update", "epoch"), [(0, 0), (2, 0.5), (4, 1), (5, 1.5), (6, 2), (7, 2)])
def test_epochs_are_counted_in_fractions(update, epoch):
    assert epoch_after(update, [4, 6]) == epoch
