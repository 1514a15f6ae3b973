"""Freed memory goes back to the system at once, where the C library would keep it for later."""

import ctypes
import sys

LARGE = 2**20
M_MMAP_THRESHOLD = -3
"""What malloc.h of glibc calls by this name."""


def give_back_freed_memory() -> None:
    """Let every block of a megabyte and more have pages of its own, which go when it is freed.

    Left alone, glibc raises that size to 32 megabytes, and a program that frees one weight after
    the other keeps a hundred megabytes that nobody uses. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
