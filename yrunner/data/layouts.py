"""Where the examples of a micro-batch lie in its rows. No layout changes a result, only its cost.

A loss is a sum over targets, and examples that share a row do not see each other. So the layout
may differ from the packs of the plan, which only decide what is learned together.
`benchmarks/packing.py` compares them.
"""

from collections.abc import Callable, Sequence
from functools import partial

from yrunner.data.packing import pack

Layout = Callable[[Sequence[int]], list[list[int]]]
"""From the lengths of a micro-batch's examples to the examples of each row."""

WIDTHS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""Row widths that `fit_rows` tries, in lengths of the longest example."""


def one_per_row(lengths: Sequence[int]) -> list[list[int]]:
    """Each example in a row of its own, padded: right for every causal model."""
    return [[example] for example in range(len(lengths))]


def all_in_one_row(lengths: Sequence[int]) -> list[list[int]]:
    """One behind the other, without any padding: for attention that takes variable lengths."""
    return [list(range(len(lengths)))]


def fit_rows(lengths: Sequence[int], *, hidden_size: int) -> list[list[int]]:
    """Few, short rows: for attention that computes the whole square of a row under a mask.

    Wide rows need less padding, narrow ones less attention. Of the widths tried, the one with the
    least work is taken: a layer multiplies each token by about 12 `hidden_size`^2 weights, and each
    token by each of its row in 2 `hidden_size` products, so attention is as dear as the rest where
    a row is 6 `hidden_size` wide.
    """

    def work(rows: list[list[int]]) -> float:
        width = max(sum(lengths[example] for example in row) for row in rows)
        return len(rows) * width * (1 + width / (6 * hidden_size))

    longest = max(lengths)
    return min((list(pack(lengths, int(longest * width))) for width in WIDTHS), key=work)


def choose_layout(attention: str, *, hidden_size: int, isolates: bool) -> Layout:
    """The cheapest layout for an attention implementation, by transformers' name of it.

    `isolates`: whether examples that share a row are kept apart, see models/isolation.py.
    """
    if not isolates:
        return one_per_row
    if attention.startswith("flash_attention"):
        return all_in_one_row
    return partial(fit_rows, hidden_size=hidden_size)
