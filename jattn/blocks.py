"""Which blocks of pairs a mask empties, fills, or cuts through.

Temporary: evaluates the mask at every pair. To be replaced by its evaluation over
intervals, which takes time in proportion to the number of blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jattn.pointwise import Index
from jattn.problem import Operands, Problem

EMPTY, PARTIAL, FULL = 0, 1, 2


def block_table(problem: Problem, operands: Operands, block_q: int, block_kv: int):
    """The kind of every block, int8, B or 1 × N or 1 × query blocks × key blocks."""
    sizes = problem.sizes
    rows, columns = -(-sizes.T // block_q), -(-sizes.S // block_kv)
    if problem.mask is None:
        return np.full((1, 1, rows, columns), FULL, np.int8)
    index = Index(
        b=jnp.arange(sizes.B, dtype=jnp.int32)[:, None, None, None],
        n=jnp.arange(sizes.N, dtype=jnp.int32)[None, :, None, None],
        t=operands.query_position[:, None, :, None],
        s=operands.key_position[:, None, None, :],
    )
    allowed = problem.mask(operands.mask, index)
    shape = (*allowed.shape[:2], sizes.T, sizes.S)
    allowed = jnp.broadcast_to(allowed, shape)
    some = _tiles(allowed, rows * block_q, columns * block_kv, False)
    every = _tiles(allowed, rows * block_q, columns * block_kv, True)
    blocked = (*shape[:2], rows, block_q, columns, block_kv)
    some = jnp.any(some.reshape(blocked), (3, 5))
    every = jnp.all(every.reshape(blocked), (3, 5))
    return some.astype(jnp.int8) + every.astype(jnp.int8)


def _tiles(allowed: jax.Array, rows: int, columns: int, fill: bool):
    whole = jnp.full((*allowed.shape[:2], rows, columns), fill)
    return jax.lax.dynamic_update_slice(whole, allowed, (0, 0, 0, 0))
