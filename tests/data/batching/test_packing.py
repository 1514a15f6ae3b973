"""Packs hold every example once, fit, and are as full as the slow and obvious way makes them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yrunner.data.batching.packing import fill_rate, pack, pack_in_order

SPACE = 40
lengths_of_examples = st.lists(st.integers(1, SPACE), min_size=1, max_size=60)


def pack_slowly(lengths, space):
    """From the longest on, each into the fullest pack with room, looking at all of them."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= space]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def lengths_in(packs, lengths):
    return sorted(sorted(lengths[example] for example in pack) for pack in packs)


@given(lengths=lengths_of_examples, seed=st.integers(0, 9))
def test_every_example_is_in_exactly_one_pack_and_no_pack_is_over_full(lengths, seed):
    packs = pack(lengths, SPACE)
    for way in (packs, packs.shuffled(lengths, (seed, 0)), pack_in_order(lengths, SPACE)):
        assert sorted(example for it in way for example in it) == list(range(len(lengths)))
        assert all(0 < sum(lengths[example] for example in it) <= SPACE for it in way)
        assert len(list(way)) == len(way)


@given(lengths=lengths_of_examples)
def test_packs_are_those_of_looking_at_every_pack_for_every_example(lengths):
    sums = sorted(map(sum, pack_slowly(lengths, SPACE)))
    packs = pack(lengths, SPACE)
    assert sorted(sum(lengths[example] for example in it) for it in packs) == sums


@given(rows=st.lists(st.sets(st.integers(1, SPACE - 1), max_size=7), min_size=1, max_size=20))
def test_rows_cut_to_pieces_are_packed_into_at_most_11_ninths_as_many(rows):
    """The bound of first-fit decreasing, which best-fit keeps, too (Johnson, 1973; Dosa, 2007)."""
    lengths = [end - start for cuts in rows for start, end in pairwise([0, *sorted(cuts), SPACE])]
    assert len(rows) <= len(pack(lengths, SPACE)) <= 11 / 9 * len(rows) + 6 / 9


@given(lengths=lengths_of_examples)
def test_in_order_a_pack_ends_where_the_next_example_has_no_room(lengths):
    packs = list(pack_in_order(lengths, SPACE))
    assert [example for it in packs for example in it] == list(range(len(lengths)))
    for this, following in pairwise(packs):
        assert sum(lengths[example] for example in this) + lengths[following[0]] > SPACE


@given(lengths=lengths_of_examples, seed=st.integers(0, 9))
def test_shuffled_packs_are_as_full_as_before(lengths, seed):
    packs = pack(lengths, SPACE)
    assert lengths_in(packs.shuffled(lengths, (seed, 1)), lengths) == lengths_in(packs, lengths)


def test_shuffling_depends_on_seed_and_epoch_alone():
    lengths = [1 + number % 19 for number in range(300)]
    packs = pack(lengths, SPACE)
    orders = [list(packs.shuffled(lengths, (seed, epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert list(packs.shuffled(lengths, (0, 0))) == orders[0]
    assert all(a != b for number, a in enumerate(orders) for b in orders[:number])


def test_examples_of_one_length_meet_every_other_in_the_course_of_epochs():
    lengths = [SPACE // 2] * 4
    packs = pack(lengths, SPACE)
    met = {tuple(sorted(it)) for epoch in range(40) for it in packs.shuffled(lengths, (3, epoch))}
    assert len(met) == 6


def test_as_many_short_examples_share_a_row_as_fit():
    assert len(pack([1] * 1000, 1000)) == 1


def test_a_hundred_thousand_examples_fill_their_rows():
    lengths = np.random.default_rng(0).lognormal(5.2, 0.7, 100_000).clip(4, 1024).astype(int)
    packs = pack(lengths, 1024)
    assert len(np.unique(packs.examples_E)) == len(lengths)
    assert fill_rate(lengths, len(packs), 1024) > 0.998


def test_the_fill_rate_is_the_share_of_places_that_hold_a_token():
    assert fill_rate([3, 4, 5], num_packs=2, space=8) == 0.75


@pytest.mark.parametrize("lengths", [[], [0, 3], [3, SPACE + 1]])
@pytest.mark.parametrize("way", [pack, pack_in_order])
def test_what_fits_no_row_is_never_packed(way, lengths):
    with pytest.raises(AssertionError):
        way(lengths, SPACE)
