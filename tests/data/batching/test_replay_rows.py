"""The kept rows of each update: all of them in turn, by counting alone."""

from collections import Counter

import pytest

from yrunner.data.batching.plan import make_plan
from yrunner.data.batching.replay_rows import count_kept, make_keep_plan

TARGETS, LENGTHS = [3, 1, 4, 1, 5, 9, 2], [8, 5, 9, 6, 10, 15, 7]


@pytest.mark.parametrize(
    ("share", "lanes", "expected"),
    [(0.33, 8, 3), (0.33, 16, 5), (0.5, 2, 1), (0.01, 8, 1), (0.99, 8, 7), (0.33, 2, 1)],
)
def test_an_update_has_a_kept_row_and_a_row_of_the_field(share, lanes, expected):
    assert count_kept(share, lanes) == expected


@pytest.mark.parametrize("per_update", [1, 3, 7, 10])
@pytest.mark.parametrize("pack_to", [None, 16])
def test_every_kept_example_is_met_equally_often_in_a_new_order(per_update, pack_to):
    plan = make_keep_plan(TARGETS, LENGTHS, per_update=per_update, seed=1, pack_to=pack_to)
    size = len(plan.packs) if pack_to else len(TARGETS)
    seen = [row for update in range(3 * size) for row in plan.rows(update)]
    rounds = [seen[start : start + size] for start in range(0, len(seen), size)]
    for rows in rounds:
        assert Counter(example for row in rows for example in row) == Counter(range(7))
        assert all(sum(LENGTHS[example] for example in row) <= (pack_to or 16) for row in rows)
    assert rounds[0] != rounds[1]


def test_the_targets_of_an_update_are_counted_without_looking_at_them():
    plan = make_keep_plan(TARGETS, LENGTHS, per_update=3, seed=0)
    for update in range(10):
        rows = plan.rows(update)
        assert plan.count_targets(update) == sum(TARGETS[row[0]] for row in rows)
        assert rows == make_keep_plan(TARGETS, LENGTHS, per_update=3, seed=0).rows(update)
    other = make_keep_plan(TARGETS, LENGTHS, per_update=3, seed=1)
    assert [other.rows(n) for n in range(10)] != [plan.rows(n) for n in range(10)]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_the_field_keeps_exact_updates_and_leaves_the_last_places(batch_size, accumulation):
    plan = make_plan(
        [1] * 12,
        token_batch=0,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=2,
        max_updates=None,
        order="shuffle",
        seed=0,
        kept_share=3 / 8,
    )
    assert plan.lanes == 5
    assert plan.num_updates == 6
    batches = list(plan)
    assert len(batches) == 6 * accumulation
    places = [row for batch in batches for row in batch]
    assert Counter(example for ((example, _),) in places) == Counter({n: 2 for n in range(12)})
    assert len(batches[-1]) == (2 if accumulation == 1 else 0)
