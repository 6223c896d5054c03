"""Kinds of blocks: empty, partial or full, as small arrays.

A kind is 0 if no pair of a block may attend, 1 if some may or nothing is known, and 2 if
all may. So 1 is right for every block. Kinds are int8, B or 1 × N or 1 × query blocks × key
blocks; an axis of blocks may also be 1, if all these blocks are of one kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EMPTY, PARTIAL, FULL = 0, 1, 2
_MOST_CELLS = 20  # along each side of a picture, so that a printed table stays small
_GLYPHS = " ░█"


def resize(kinds, lengths, blocks, wanted):
    """Computes the kinds of blocks of another size, as precisely as the kinds allow.

    A new block inside an old block has the old block's kind. A new block that overlaps
    several old blocks is empty if all of them are empty, full if all are full, and partial
    otherwise.

    Args:
        kinds: The kinds of the old blocks, a NumPy array or a traced array; the result is
            of the same sort.
        lengths: T and S.
        blocks: The size of the old blocks.
        wanted: The size of the new blocks.

    Returns:
        The kinds, int8; an axis of blocks is 1 where it was.
    """
    # A new block has one kind for sure if the least and the greatest old kind agree.
    low = high = kinds
    for axis, length, have, want in zip((-2, -1), lengths, blocks, wanted, strict=True):
        if kinds.shape[axis] == 1 or have == want:
            continue
        overlaps = _overlaps(length, have, want)
        low = _over(low, overlaps, axis, "min")
        high = _over(high, overlaps, axis, "max")
    xp = module(kinds)
    return xp.where(low == high, low, PARTIAL).astype(np.int8)


def _overlaps(length: int, have: int, want: int) -> np.ndarray:
    """Gives for each new block the old blocks that it overlaps.

    The last of them is repeated, so that all new blocks have equally many.
    """
    first = np.arange(0, length, want)
    # The first and the last old block that each new block overlaps.
    start, last = first // have, (np.minimum(first + want, length) - 1) // have
    most = np.max(last - start, initial=0) + 1
    return np.minimum(start[:, None] + np.arange(most), last[:, None])


def _over(kinds, overlaps, axis, extreme):
    xp = module(kinds)
    parts = xp.take(kinds, overlaps.reshape(-1), axis=axis)
    shape = list(kinds.shape)
    shape[kinds.ndim + axis : kinds.ndim + axis + 1] = overlaps.shape
    return getattr(xp, extreme)(parts.reshape(shape), axis=kinds.ndim + axis + 1)


def spread(kinds, lengths, blocks):
    """Gives the kinds with their two last axes in full."""
    counts = [-(-length // block) for length, block in zip(lengths, blocks, strict=True)]
    return module(kinds).broadcast_to(kinds, (*kinds.shape[:-2], *counts))


def cut_last(kinds):
    """Makes the last block of keys partial where it is full: not all its keys count."""
    xp = module(kinds)
    last = xp.arange(kinds.shape[-1]) == kinds.shape[-1] - 1
    return xp.where(last, xp.minimum(kinds, PARTIAL), kinds)


# XLA evaluates what does not depend on arguments when it compiles. To sort so many numbers
# it takes a second, and a GPU less than 50 µs (estimated).
_MOST_FOLDED = 2**15


def visits(kinds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists the blocks along the last axis: full ones first, then partial, then empty ones.

    Returns:
        The order, how many of them are full, and how many are full or partial; int32.
    """
    xp = module(kinds)
    is_small = isinstance(kinds.size, int) and kinds.size <= _MOST_FOLDED
    if xp is jnp and not is_small:
        kinds = lax.optimization_barrier(kinds)
    # The sort is by FULL − kind. It is stable: blocks of a kind stay in order.
    order = xp.argsort(FULL - kinds, axis=-1, stable=True)
    full = xp.sum(kinds == FULL, axis=-1)
    live = xp.sum(kinds != EMPTY, axis=-1)
    order, full, live = (jnp.asarray(x.astype(np.int32)) for x in (order, full, live))
    return order, full, live


def shares(kinds: np.ndarray) -> list[str]:
    """Says which share of the blocks is of each kind, as text."""
    names = {"empty": EMPTY, "partial": PARTIAL, "full": FULL}
    whole = max(kinds.size, 1)
    return [
        f"{percent(np.count_nonzero(kinds == kind) / whole)} {name}"
        for name, kind in names.items()
    ]


def percent(share: float) -> str:
    """Writes a share as text; 0 % means exactly none, and 100 % exactly all."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(100 * share, 0.1), 99.9):.3g} %"


def draw(kinds: np.ndarray) -> list[str]:
    """Draws kinds as at most 20 × 20 characters: █ full, ░ partial, blank empty."""
    wanted = [-(-count // _MOST_CELLS) for count in kinds.shape]
    cells = resize(kinds, kinds.shape, (1, 1), wanted)
    cells = np.broadcast_to(
        cells, [-(-n // w) for n, w in zip(kinds.shape, wanted, strict=True)]
    )
    return ["".join(_GLYPHS[kind] for kind in row).rstrip() for row in cells]


def module(kinds):
    """Gives NumPy for kinds that are known, and its namesake in JAX for traced ones."""
    return np if isinstance(kinds, np.ndarray) else jnp
