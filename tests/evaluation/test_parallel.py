"""Questions shared by processes come back whole and in order."""

import pytest

from yrunner.evaluation import parallel as sharing


def double(items):
    return [2 * item for item in items]


def test_a_process_alone_does_everything():
    assert sharing.share_out([3, 1, 2], double) == [6, 2, 4]
    assert sharing.is_first()
    with sharing.joined() as writes:
        assert writes


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_every_process_gets_all_results_in_order(monkeypatch, num_items, size):
    """Each process in turn, with what the others would have sent."""
    items = list(range(num_items))
    worked = []

    def work(own):
        worked.extend(own)
        return double(own)

    def gather(own):
        parts = [double(items[rank::size]) for rank in range(size)]
        assert own in parts
        return parts

    monkeypatch.setattr(sharing, "is_joined", lambda: True)
    monkeypatch.setattr(sharing, "num_ranks", lambda: size)
    monkeypatch.setattr(sharing, "gather_over_ranks", gather)
    for rank in range(size):
        monkeypatch.setattr(sharing, "this_rank", lambda rank=rank: rank)
        assert sharing.share_out(items, work) == double(items)
        assert sharing.is_first() == (rank == 0)
    assert sorted(worked) == items, "and no question is asked twice"
