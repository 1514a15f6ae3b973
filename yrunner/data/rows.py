"""A row as it stands in a data file, before anybody asks what it means."""

from collections.abc import Callable
from typing import Any

from yrunner.errors import Origin

Row = tuple[Origin, Any]
"""A row as it stands in the file (a mapping, where the file is sound), and its place."""

Advance = Callable[[int], object]
"""Is told the number of bytes of the file, as it lies on the disk, that were read just now."""


class Damaged(str):
    """The reason why a row could not be read."""

    __slots__ = ()
