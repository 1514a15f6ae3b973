"""Scores on disk survive any end of the process, and are never those of another row or model."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring.measure import TokenScores, score_by_length
from yrunner.scoring.score_file import ScoreFile, row_hashes
from yrunner.tokens import IGNORE_INDEX

HASHES = ["a", "b", "c", "b"]


def make_scores(number: int, num_targets: int) -> TokenScores:
    """Any scores, different for every number."""
    torch.manual_seed(number)
    figures = torch.rand(3, num_targets)
    top_N = torch.randint(150_000, (num_targets,))
    context_NC = torch.randn(num_targets, 5).half() if number < 3 else None
    return TokenScores(*figures, top_N, Origin(Path("数据/rows.jsonl"), number + 1), context_NC)


ROWS = [make_scores(number, num_targets) for number, num_targets in enumerate([3, 0, 1, 2])]


def assert_same(scores: TokenScores, expected: TokenScores) -> None:
    assert scores.origin == expected.origin
    for name in ("loss_N", "entropy_N", "weight_N", "top_N"):
        assert torch.equal(getattr(scores, name), getattr(expected, name))
    assert (scores.context_NC is None) == (expected.context_NC is None)
    if expected.context_NC is not None:
        assert torch.equal(scores.context_NC, expected.context_NC)


def write(folder: Path, rows: range, *, key: str = "key", rank: int = 0) -> Path:
    """Append the missing ones of some rows; return the file."""
    with ScoreFile.open(folder, key, HASHES, rank=rank) as scores:
        for index in rows:
            if index not in scores.done:
                scores.append(index, ROWS[index])
    return folder / f"rank-{rank}.scores"


def test_scores_are_read_as_written_in_the_order_of_rows(tmp_path):
    with ScoreFile.open(tmp_path, "key", HASHES) as scores:
        for index in (2, 0, 3, 1):
            scores.append(index, ROWS[index])
        assert scores.done == {0, 1, 2, 3}
        found = scores.read()
    assert len(found) == 4
    for stored, expected in zip(found, ROWS, strict=True):
        assert_same(stored, expected)
    assert_same(found[-1], ROWS[-1])
    for stored, expected in zip(found[1:3], ROWS[1:3], strict=True):
        assert_same(stored, expected)


def test_a_file_truncated_at_any_byte_resumes_to_the_same_bytes(tmp_path):
    file = write(tmp_path, range(4))
    whole = file.read_bytes()
    sizes = []
    for num_rows in range(5):
        sizes.append(write(tmp_path / str(num_rows), range(num_rows)).stat().st_size)
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with ScoreFile.open(tmp_path, "key", HASHES) as scores:
            assert len(scores.done) == sum(size <= end for size in sizes[1:])
        write(tmp_path, range(4))
        assert file.read_bytes() == whole


def test_a_damaged_byte_costs_its_record_and_those_behind_it_but_gives_no_wrong_score(tmp_path):
    file = write(tmp_path, range(4))
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        write(tmp_path, range(4))
        assert file.read_bytes() == whole


def test_a_file_of_another_key_is_replaced(tmp_path):
    write(tmp_path, range(4), key="a model")
    with ScoreFile.open(tmp_path, "another model", HASHES) as scores:
        assert scores.done == set()
    with ScoreFile.open(tmp_path, "a model", HASHES) as scores:
        assert scores.done == set()


def test_each_process_has_a_file_and_reads_those_of_all(tmp_path):
    write(tmp_path, range(0, 2), rank=0)
    write(tmp_path, range(2, 3), rank=1)
    write(tmp_path, range(1), rank=2, key="an older model")
    with ScoreFile.open(tmp_path, "key", HASHES) as scores:
        assert scores.done == {0, 1, 2}
        write(tmp_path, range(3, 4), rank=1)
        for stored, expected in zip(scores.read(), ROWS, strict=True):
            assert_same(stored, expected)


def test_rows_keep_their_scores_where_others_are_added_or_taken_away(tmp_path):
    write(tmp_path, range(4))
    with ScoreFile.open(tmp_path, "key", ["new", "b", "a", "b", "b"]) as scores:
        assert scores.done == {1, 2, 3}, "of three rows with equal content two have scores"
        for index in (0, 4):
            scores.append(index, make_scores(10 + index, 1))
    with ScoreFile.open(tmp_path, "key", ["new", "b", "a", "b", "b"]) as scores:
        expected = [make_scores(10, 1), ROWS[1], ROWS[0], ROWS[3], make_scores(14, 1)]
        for stored, row in zip(scores.read(), expected, strict=True):
            assert_same(stored, row)


def test_scores_have_the_current_origin_of_their_row(tmp_path):
    write(tmp_path, range(4))
    with ScoreFile.open(tmp_path, "key", HASHES) as scores:
        found = scores.read(lambda index: Origin(Path("moved.jsonl"), index + 100))
    for index in range(-4, 4):
        origin = Origin(Path("moved.jsonl"), index % 4 + 100)
        assert_same(found[index], replace(ROWS[index], origin=origin))


def test_missing_scores_are_an_error(tmp_path):
    write(tmp_path, range(3))
    with (
        ScoreFile.open(tmp_path, "key", HASHES) as scores,
        pytest.raises(AssertionError, match="1 rows have no scores"),
    ):
        scores.read()


@pytest.fixture
def limit_file_size():
    """Limit the size of files, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_only_the_row_that_did_not_fit(tmp_path, limit_file_size):
    whole = write(tmp_path / "whole", range(4)).read_bytes()
    file = write(tmp_path / "full", range(2))
    with ScoreFile.open(tmp_path / "full", "key", HASHES) as scores:
        limit_file_size(file.stat().st_size + 20)
        with pytest.raises(OSError, match="too large"):
            scores.append(2, ROWS[2])
        assert scores.done == {0, 1}
        limit_file_size(len(whole))
        for index in (2, 3):
            scores.append(index, ROWS[index])
    assert file.read_bytes() == whole


def test_a_hash_tells_rows_apart_by_tokens_and_targets_alone():
    origin = Origin(Path("a"), 1)
    example = TokenizedExample([1, 2, 3], [IGNORE_INDEX, 2, 3], origin)
    moved = replace(example, origin=Origin(Path("b"), 2))
    other_token = TokenizedExample([4, 2, 3], [IGNORE_INDEX, 2, 3], origin)
    other_target = replace(example, labels=[IGNORE_INDEX, IGNORE_INDEX, 3])
    longer = TokenizedExample([1, 2, 3, 4], [IGNORE_INDEX, 2, 3, IGNORE_INDEX], origin)
    hashes = row_hashes([example, moved, other_token, other_target, longer])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("num_appended", [0, 1, 6, 7, 39, 40])
def test_a_measurement_that_is_killed_and_started_again_leaves_the_same_bytes(
    make_model, examples, tmp_path, num_appended
):
    def measure(folder: Path, most: int) -> bytes:
        with ScoreFile.open(folder, "key", row_hashes(examples)) as file:
            options = {"pad_token_id": 0, "max_tokens": 300, "done": file.done}
            scores = score_by_length(make_model(), examples, **options)
            for _, (index, scored) in zip(range(most), scores, strict=False):
                file.append(index, scored)
        return (folder / "rank-0.scores").read_bytes()

    whole = measure(tmp_path / "whole", 40)
    measure(tmp_path / "killed", num_appended)
    assert measure(tmp_path / "killed", 40) == whole
