"""The steps of a kernel: which block of queries meets which block of keys, in which order.

A step is one int32. Steps of one block on the outer side follow each other, so that its
sums stay where they are; blocks that a mask leaves empty are not among the steps at all,
and neither copied nor computed. An outer block that meets nothing has one idle step, for
its result must be written too.

    bits   0–2 kind   3 first of its outer block   4 last   5–17 inner   18–30 outer

Forward, an inner block is two of the table's, for larger ones are computed in fewer
instructions. Where one of the two is empty, the step is of the other half alone.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.blocks.kinds import EMPTY, FULL, PARTIAL

HALF = 3  # a kind beside those of a table: the first half alone; the next, the second
FIRST, LAST = 8, 16
_INNER, _OUTER = 5, 18
MOST_INNER = 2**13  # blocks; as many outer ones


def schedule(kinds: Any, heads: int, halves: int = 1):
    """The steps over kinds, B or 1 × N or 1 × outer × inner blocks; and how many there are.

    They are int32, examples × heads × steps, the first two perhaps 1. The count is a
    number where nothing is traced.

    `heads` is how many the kernel has; where these are fewer than the table's, some share
    their steps. `halves` is how many of the table's blocks an inner block is, 1 or 2.
    """
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    kinds = _shared(xp, kinds, heads)
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
    # Where others take longer: stay at the last block, and do nothing.
    end = xp.take_along_axis(words, counts - 1, axis=-1) >> _INNER << _INNER
    every = xp.arange(outer * inner, dtype=np.int32).reshape(1, 1, -1)
    words = xp.where(every < counts, words, end)
    count = xp.max(counts)
    if xp is np:
        count = int(count)
        words = words[..., :count]
    return jnp.asarray(words), count


def blocks(word):
    """The outer and the inner block of a step."""
    return word >> _OUTER, (word >> _INNER) & (MOST_INNER - 1)


def kind(word):
    """Whether the block of a step is empty, partial, full, or which half of it counts."""
    return word & 7


def _shared(xp, kinds, heads: int):
    """One kind for the heads that share their steps: partial where they differ."""
    B, N, outer, inner = kinds.shape
    if heads >= N:
        return kinds
    kinds = kinds.reshape(B, heads, N // heads, outer, inner)
    low, high = xp.min(kinds, axis=2), xp.max(kinds, axis=2)
    return xp.where(low == high, low, np.int8(PARTIAL))


def _joined(xp, kinds):
    """The kinds of twice as long inner blocks; one more that is empty where one is odd."""
    kinds = xp.pad(kinds, [(0, 0)] * 3 + [(0, kinds.shape[3] % 2)])
    first, second = kinds[..., 0::2], kinds[..., 1::2]
    both = xp.where((first == FULL) & (second == FULL), np.int8(FULL), np.int8(PARTIAL))
    alone = xp.where(second == EMPTY, np.int8(HALF), np.int8(HALF + 1))
    either = xp.where((first == EMPTY) | (second == EMPTY), alone, both)
    return xp.where((first == EMPTY) & (second == EMPTY), np.int8(EMPTY), either)
