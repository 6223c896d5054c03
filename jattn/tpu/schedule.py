"""The steps of a kernel: which block of queries meets which block of keys, in which order.

A step is one int32. Steps of one block on the outer side follow each other, so that its
sums stay where they are; blocks that a mask leaves empty are not among the steps at all,
and neither copied nor computed. An outer block that meets nothing has one idle step, for
its result must be written too.

    bits   0–1 kind   2 first of its outer block   3 last   4–16 inner   17–30 outer
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.tables import EMPTY, PARTIAL

FIRST, LAST = 4, 8
_INNER, _OUTER = 4, 17
MOST_INNER, MOST_OUTER = 2**13, 2**14  # blocks


def schedule(kinds: Any, heads: int):
    """The steps over kinds, B or 1 × N or 1 × outer × inner blocks; and how many there are.

    They are int32, examples × heads × steps, the first two perhaps 1. The count is a
    number where nothing is traced.

    `heads` is how many the kernel has; where these are fewer than the table's, some share
    their steps.
    """
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    kinds = _shared(xp, kinds, heads)
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
    """Whether the block of a step is empty, partial or full."""
    return word & 3


def _shared(xp, kinds, heads: int):
    """One kind for the heads that share their steps: partial where they differ."""
    B, N, outer, inner = kinds.shape
    if heads >= N:
        return kinds
    kinds = kinds.reshape(B, heads, N // heads, outer, inner)
    low, high = xp.min(kinds, axis=2), xp.max(kinds, axis=2)
    return xp.where(low == high, low, np.int8(PARTIAL))
