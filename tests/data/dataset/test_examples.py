"""Examples on disk are the examples that were written, whatever the ids."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yrunner.data.conversation import TokenizedParts
from yrunner.data.dataset.examples import Examples, ExampleWriter, StoredFile, Traits
from yrunner.errors import Origin

FILE = Path("rows.jsonl")


def parts(ids: list[int], is_target: list[bool], row: int) -> TokenizedParts:
    """One part per token, and empty ones between parts of the same kind."""
    by_turns: list[list[int]] = []
    for id_, target in zip(ids, is_target, strict=True):
        if len(by_turns) % 2 != target:
            by_turns.append([])
        by_turns.append([id_])
    return TokenizedParts([*by_turns, []], Origin(FILE, row))


def store(
    folder: Path, examples: list[TokenizedParts], vocabulary_size: int, chunk: int = 3
) -> StoredFile:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ExampleWriter(folder, vocabulary_size)
    for start in range(0, len(examples), chunk):
        part = examples[start : start + chunk]
        writer.add(part, [Traits(one.origin.row, 2**64 - 1, 1) for one in part])
    writer.finish()
    return StoredFile(folder, FILE)


@pytest.mark.parametrize("vocabulary_size", [300, 2**15, 2**15 + 1, 151_936])
@given(data=st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, vocabulary_size: int
) -> None:
    tokens = st.tuples(st.integers(0, vocabulary_size - 1), st.booleans())
    rows = data.draw(st.lists(st.lists(tokens, min_size=1, max_size=9), max_size=8))
    stored = [
        parts([id_ for id_, _ in row], [target for _, target in row], number)
        for number, row in enumerate(rows, start=1)
    ]
    written = [one.example() for one in stored]
    examples = Examples.of([store(tmp_path_factory.mktemp("store"), stored, vocabulary_size)])
    assert list(examples) == written
    assert examples.lengths.tolist() == [len(one.input_ids) for one in written]
    assert examples.num_targets.tolist() == [len(one.target_positions) for one in written]


@pytest.fixture
def two_files(tmp_path: Path) -> Examples:
    first = [parts([number, number + 1], [False, True], number) for number in range(1, 6)]
    second = [parts([9, 9, 9], [False, True, True], number) for number in range(1, 4)]
    files = [store(tmp_path / "a", first, 300), store(tmp_path / "b", second, 300)]
    return Examples.of(files)


def test_examples_of_several_files_stand_one_after_the_other(two_files: Examples) -> None:
    assert [one.origin.row for one in two_files] == [1, 2, 3, 4, 5, 1, 2, 3]
    assert two_files.lengths.tolist() == [2] * 5 + [3] * 3
    assert two_files.column("contents").tolist() == [1, 2, 3, 4, 5, 1, 2, 3]


def test_some_examples_can_be_chosen_and_joined_again(two_files: Examples) -> None:
    odd = two_files.select(np.arange(1, len(two_files), 2))
    even = two_files.select(np.arange(0, len(two_files), 2))
    both = Examples.joined([even, odd])
    assert [one.origin for one in both] == [one.origin for one in [*even, *odd]]
    assert list(both)[4:] == list(odd)
    assert both.origin(4) == odd[0].origin


def test_a_slice_is_examples_too_and_the_last_one_is_at_minus_one(two_files: Examples) -> None:
    assert list(two_files[2:4]) == [two_files[2], two_files[3]]
    assert two_files[-1] == list(two_files)[-1]


def test_a_file_without_examples_can_be_stored(tmp_path: Path) -> None:
    stored = store(tmp_path / "empty", [], 300)
    assert len(stored) == 0
    assert list(Examples.of([stored])) == []
    assert Examples.joined([]).lengths.tolist() == []


def test_a_hash_of_all_bits_survives(tmp_path: Path) -> None:
    examples = Examples.of([store(tmp_path / "a", [parts([1, 2], [False, True], 1)], 300)])
    assert examples.column("prompts").tolist() == [2**64 - 1]


@given(data=st.data())
def test_the_short_form_is_cut_like_the_long_one(data: st.DataObject) -> None:
    lists = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=2, max_size=6)
    whole = TokenizedParts(data.draw(lists), Origin(FILE, 1))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole) + 2))
    piece, long = whole.cut(start, end).example(), whole.example()
    assert piece.input_ids == long.input_ids[start:end]
    assert piece.labels[1:] == long.labels[start:end][1:]
    assert len(whole.cut(start, end)) == len(piece.input_ids)
    assert whole.cut(start, end).has_targets == bool(piece.target_positions)
