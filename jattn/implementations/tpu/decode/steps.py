"""The steps of the kernel: which blocks of slots an example reads, in which order.

A step is one int32. A block that the mask leaves empty has no step, so it is neither copied
nor computed. An example that reads fewer blocks than others stays at its last one, which is
not copied again, and does nothing.

    bits   0–1 kind   2 last of its example and head   3–30 block
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.blocks.kinds import EMPTY

LAST = 4  # bit 2
_BLOCK = 3  # the lowest bit of the block


def steps(kinds: Any):
    """Makes the steps of kinds B or 1 × K or 1 × blocks: likewise, and their count.

    The count is a Python number if the kinds are NumPy's. There is no sort, which would
    be a program of its own: the step of a block is the number of live blocks before it.
    """
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    blocks = kinds.shape[-1]
    live = kinds != EMPTY
    counts = xp.sum(live, axis=-1, keepdims=True, dtype=np.int32)
    rank = xp.cumsum(live, axis=-1, dtype=np.int32) - 1
    every = xp.arange(blocks, dtype=np.int32).reshape(1, 1, blocks)
    words = kinds.astype(np.int32) + (every << _BLOCK)
    words = words + xp.where(rank == counts - 1, LAST, 0).astype(np.int32)
    here = live[..., None, :] & (rank[..., None, :] == every[..., None])
    ordered = xp.sum(xp.where(here, words[..., None, :], 0), axis=-1, dtype=np.int32)
    furthest = xp.max(xp.where(live, every, 0), axis=-1, keepdims=True) << _BLOCK
    idle = furthest + xp.where((counts == 0) & (every == 0), LAST, 0).astype(np.int32)
    words = xp.where(every < counts, ordered, idle).astype(np.int32)
    count = xp.maximum(xp.max(counts), 1)
    return jnp.asarray(words), int(count) if xp is np else count


def block(word):
    """Reads the block of a step."""
    return word >> _BLOCK


def kind(word):
    """Reads the kind of a step."""
    return word & 3
