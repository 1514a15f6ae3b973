"""A layout holds every example once, and the cheapest is chosen for each kind of attention."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yrunner.data.batching.collate import all_in_one_row, choose_layout, fit_rows, one_per_row

lengths_of_examples = st.lists(st.integers(1, 50), min_size=1, max_size=30)
ATTENTION = ["eager", "sdpa", "flash_attention_2"]


def area(rows, lengths):
    return len(rows) * max(sum(lengths[example] for example in row) for row in rows)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("isolates", [False, True])
@given(lengths=lengths_of_examples)
def test_every_example_lies_in_exactly_one_row(attention, isolates, lengths):
    rows = choose_layout(attention, hidden_size=64, isolates=isolates)(lengths)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(rows)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_that_mixes_the_examples_of_a_row_never_gets_two(attention):
    layout = choose_layout(attention, hidden_size=64, isolates=False)
    assert layout([3, 1, 2]) == one_per_row([3, 1, 2]) == [[0], [1], [2]]


def test_attention_of_variable_lengths_gets_one_row_without_padding():
    layout = choose_layout("flash_attention_2", hidden_size=64, isolates=True)
    assert layout([3, 1, 2]) == all_in_one_row([3, 1, 2]) == [[0, 1, 2]]


@given(lengths=lengths_of_examples, hidden_size=st.sampled_from([1, 64, 4096]))
def test_fitted_rows_are_never_dearer_than_one_row_for_each(lengths, hidden_size):
    rows = fit_rows(lengths, hidden_size=hidden_size)
    assert max(map(len, rows)) == 1 or len(rows) < len(lengths)
    width = max(sum(lengths[example] for example in row) for row in rows)
    longest = max(lengths)
    assert area(rows, lengths) * (1 + width / (6 * hidden_size)) <= len(lengths) * longest * (
        1 + longest / (6 * hidden_size)
    )


def test_a_narrow_model_gets_narrower_rows_than_a_wide_one():
    lengths = [600, 400, 400, 400, 400, 400, 400, 400]
    narrow = fit_rows(lengths, hidden_size=64)
    wide = fit_rows(lengths, hidden_size=4096)
    assert max(map(len, narrow)) == 1, "a row of 1,200 costs a narrow model more than the padding"
    assert area(wide, lengths) == 3 * 1200


def test_hardly_anything_is_padding_where_lengths_are_uneven():
    lengths = np.random.default_rng(0).lognormal(5.2, 0.7, 20).clip(4, 1024).astype(int).tolist()
    assert sum(lengths) / area(one_per_row(lengths), lengths) < 0.5
    assert sum(lengths) / area(fit_rows(lengths, hidden_size=1024), lengths) > 0.85
