"""Room for compiled programs, of which a process can hold only so many."""

import itertools
import pathlib

import jax

_MAPS = pathlib.Path("/proc/self/maps")  # of Linux
_CALLS = itertools.count(1)


def make_room() -> None:
    """Forgets compiled programs before there are too many for one process.

    Each takes some of the 65,530 pieces of memory that Linux lets a process map, and XLA
    crashes where it gets no more: after about 600 slow tests.
    """
    # Counting the pieces takes milliseconds, so it is not done at every call.
    if next(_CALLS) % 10 or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
