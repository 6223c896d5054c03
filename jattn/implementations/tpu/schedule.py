"""The steps of a kernel: which block of queries meets which block of keys, in which order.

A step is one int32. The steps of one outer block follow each other, so that its sums stay
in place. Blocks that a mask leaves empty have no step, so they are neither copied nor
computed. An outer block that meets no inner block still has one idle step, because its
result must be written too.

    bits   0–2 kind   3 first of its outer block   4 last   5–17 inner   18–30 outer

In the forward pass an inner block consists of two blocks of the table, since larger blocks
take fewer instructions. If one of the two is empty, the step computes the other half alone.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.blocks.kinds import EMPTY, FULL, PARTIAL

HALF = 3  # 3: only the first half of a joined block is live; 4: only the second
FIRST, LAST = 8, 16  # bits 3 and 4
_INNER, _OUTER = 5, 18  # the lowest bits of the inner and of the outer block
MOST_INNER = 2**13  # blocks, as their number has 13 bits; and as many outer blocks


def schedule(kinds: Any, heads: int, halves: int = 1):
    """Makes the steps over kinds, B or 1 × N or 1 × outer × inner; and counts them.

    The steps are int32, examples × heads × steps; examples and heads may be 1. The count
    is a Python number if the kinds are NumPy's.

    `heads` is the number of heads of the kernel. If the table has more, several of its
    heads share their steps. `halves` says how many blocks of the table make an inner
    block, 1 or 2.
    """
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    kinds = shared(xp, kinds, heads)
    kinds = _joined(xp, kinds) if halves == 2 else kinds
    B, N, outer, inner = kinds.shape
    live = kinds != EMPTY
    inners = xp.arange(inner, dtype=np.int32).reshape(1, 1, 1, inner)
    outers = xp.arange(outer, dtype=np.int32).reshape(1, 1, outer, 1)
    idle = ~xp.any(live, axis=3, keepdims=True) & (inners == 0)
    visited = live | idle
    rank = xp.cumsum(visited.astype(np.int32), axis=3, dtype=np.int32)
    first, last = rank == 1, rank == rank[..., -1:]
    words = kinds.astype(np.int32)
    words = words + xp.where(first, FIRST, 0).astype(np.int32)
    words = words + xp.where(last, LAST, 0).astype(np.int32)
    words = words + (inners << _INNER) + (outers << _OUTER)
    words, visited = (x.reshape(B, N, outer * inner) for x in (words, visited))
    order = xp.argsort(~visited, axis=-1, stable=True)
    words = xp.take_along_axis(words, order, axis=-1)
    counts = xp.sum(visited, axis=-1, keepdims=True, dtype=np.int32)
    # A head with fewer steps than others stays at its last block, with a kind of EMPTY
    # and no flags, and does nothing.
    end = xp.take_along_axis(words, counts - 1, axis=-1) >> _INNER << _INNER
    every = xp.arange(outer * inner, dtype=np.int32).reshape(1, 1, -1)
    words = xp.where(every < counts, words, end)
    count = xp.max(counts)
    if xp is np:
        count = int(count)
        words = words[..., :count]
    return jnp.asarray(words), count


def blocks(word):
    """Reads the outer and the inner block of a step."""
    return word >> _OUTER, (word >> _INNER) & (MOST_INNER - 1)


def kind(word):
    """Reads the kind of a step: empty, partial, full, or which half is live alone."""
    return word & 7


def shared(xp, kinds, heads: int):
    """Merges the kinds of heads that share their steps: partial where they differ."""
    B, N, outer, inner = kinds.shape
    if heads >= N:
        return kinds
    kinds = kinds.reshape(B, heads, N // heads, outer, inner)
    low, high = xp.min(kinds, axis=2), xp.max(kinds, axis=2)
    return xp.where(low == high, low, np.int8(PARTIAL))


def _joined(xp, kinds):
    """Joins the kinds of each two inner blocks; an empty block completes an odd number."""
    kinds = xp.pad(kinds, [(0, 0)] * 3 + [(0, kinds.shape[3] % 2)])
    first, second = kinds[..., 0::2], kinds[..., 1::2]
    both = xp.where((first == FULL) & (second == FULL), np.int8(FULL), np.int8(PARTIAL))
    alone = xp.where(second == EMPTY, np.int8(HALF), np.int8(HALF + 1))
    either = xp.where((first == EMPTY) | (second == EMPTY), alone, both)
    return xp.where((first == EMPTY) & (second == EMPTY), np.int8(EMPTY), either)
