"""A folder that all processes write into: there whole, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yrunner.ranks import this_rank, wait_for_ranks
from yrunner.run_dir import partial_folder, whole_folder


@contextmanager
def shared_folder(final: Path, needed: int | None = None) -> Iterator[Path]:
    """As `whole_folder`, made and named by rank 0, when every process has written its part.

    On several machines it has to lie on a disk that they share.
    """
    if this_rank() == 0:
        with whole_folder(final, needed) as folder:
            wait_for_ranks()
            yield folder
            wait_for_ranks()
    else:
        wait_for_ranks()
        yield partial_folder(final)
        wait_for_ranks()
    # Named now; the others may look for it.
    wait_for_ranks()
