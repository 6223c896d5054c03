"""Which blocks of pairs a mask empties, fills, or cuts through.

Temporary: evaluates the mask at every pair. To be replaced by its evaluation over
intervals, which takes time in proportion to the number of blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jattn.pointwise import Index
from jattn.problem import Operands, Problem
from jattn.problem import index as problem_index

EMPTY, PARTIAL, FULL = 0, 1, 2


def block_table(problem: Problem, operands: Operands, block_q: int, block_kv: int):
    """The kind of every block, int8, B or 1 × N or 1 × query blocks × key blocks."""
    sizes = problem.sizes
    rows, columns = -(-sizes.T // block_q), -(-sizes.S // block_kv)
    if problem.mask is None:
        return np.full((1, 1, rows, columns), FULL, np.int8)
    # A few rows at a time, each of them ending in padding that says nothing.
    index = problem_index(problem, operands)

    def block(i):
        rows = jnp.minimum(i * block_q + jnp.arange(block_q), sizes.T - 1)
        take = lambda x: x if x.shape[2] == 1 else jnp.take(x, rows, axis=2)
        arrays = operands.mask._replace(aligned=tuple(map(take, operands.mask.aligned)))
        allowed = problem.mask(arrays, Index(*map(take, index)))
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:3], sizes.S))
        pad = lambda fill: jnp.full((*allowed.shape[:3], columns * block_kv), fill)
        put = lambda fill: jax.lax.dynamic_update_slice(pad(fill), allowed, (0,) * 4)
        split = lambda x: x.reshape(*x.shape[:3], columns, block_kv)
        some = jnp.any(split(put(False)), (2, 4)).astype(jnp.int8)
        return some + jnp.all(split(put(True)), (2, 4)).astype(jnp.int8)

    return jnp.moveaxis(jax.lax.map(block, jnp.arange(rows)), 0, 2)
