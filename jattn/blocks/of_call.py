"""Which blocks of a call can be skipped, and which need no mask.

One table serves every implementation: for each block of queries and block of keys, whether
the mask lets no pair, some pairs or all pairs of it attend. It is computed from the mask's
program by `jattn.blocks`, in work and memory that grow with the number of blocks and with
T + S, never with T × S; or it is a table that came with the call. Blocks on which the
modifier answers −∞ to everything are empty. So are blocks on which the bias is −∞, if the
bias is the same for all queries or for all keys; any other bias would have to be read as a
whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.blocks import classify
from jattn.blocks.graph import KEY, QUERY, concrete
from jattn.blocks.kinds import EMPTY as EMPTY
from jattn.blocks.kinds import FULL, PARTIAL, resize
from jattn.blocks.select import per_block
from jattn.call.problem import Operands, Problem, example
from jattn.operations.varying import locally


def skips(problem: Problem, operands: Operands | None) -> bool:
    """Says whether a mask, a modifier or a one-sided bias may leave a block out."""
    bias = None if operands is None else operands.bias
    programs = problem.mask, problem.modifier
    return programs != (None, None) or _is_one_sided(bias)


def block_table(problem: Problem, operands: Operands, block_q: int, block_kv: int):
    """Finds the kind of every block: int8, B or 1 × N or 1 × query blocks × key blocks.

    The result is a NumPy array if nothing is traced, otherwise a traced array. With
    symbolic sizes every block counts as partial.
    """
    *_, T, S = problem.sizes.BNTS
    shape = (1, 1, -(-T // block_q), -(-S // block_kv))
    if not problem.sizes.are_known:
        return jnp.full(shape, PARTIAL, jnp.int8)
    rest: dict[str, Any] = dict.fromkeys(("query", "key", "value", "scale", "rng"))
    decisive = operands._replace(**rest)
    # Kinds are integers, so they have no derivatives, and the rules need none.
    decisive = jax.tree.map(_constant, decisive)
    return locally(_block_table, (problem, block_q, block_kv), decisive)


def _block_table(problem: Problem, block_q: int, block_kv: int, operands: Operands):
    B, N, T, S = problem.sizes.BNTS
    # Without a mask all blocks are full; a modifier and a bias may make some of them empty.
    kinds = np.full((1, 1, -(-T // block_q), -(-S // block_kv)), FULL, np.int8)
    positions = (operands.query_position, operands.key_position)
    points = classify.grid((B, N, T, S), (block_q, block_kv), *positions)
    points = dataclasses.replace(points, b=example(problem, np).reshape(-1, 1, 1, 1))
    mask, modifier = operands.mask, operands.modifier
    if operands.kinds is not None:
        kinds = resize(operands.kinds, (T, S), problem.blocks, (block_q, block_kv))
        if problem.settled:  # the table has the modifier and the bias in it
            return kinds
    elif problem.mask is not None:
        jaxpr = problem.mask.jaxpr
        kinds = classify.classify(jaxpr, mask.captured, points, mask.aligned)
    if problem.modifier is not None:
        jaxpr = problem.modifier.jaxpr
        dead = classify.dead_blocks(jaxpr, modifier.captured, points, modifier.aligned)
        kinds = kinds * (~dead).astype(np.int8)
    if _is_one_sided(operands.bias):
        # A block is empty if its largest bias is −∞.
        most: Any = concrete(operands.bias)
        for axis, size in ((QUERY, block_q), (KEY, block_kv)):
            most = per_block(most, axis, size, "max")
        kinds = kinds * (most != -np.inf).astype(np.int8)
    return kinds


def _is_one_sided(bias) -> bool:
    return bias is not None and 1 in bias.shape[2:]


def _constant(array):
    # A concrete array must stay concrete, so that the table is a NumPy array.
    if not isinstance(array, jax.core.Tracer):
        return array
    array = jax.lax.stop_gradient(array)
    # Where a caller's `jit` closes over a mask, XLA would compute the table while it
    # compiles: 28 s for 2048 × 2048, so 0.1 s for 2¹⁴, rather than 1 ms in each call. From
    # numbers it should: then a GPU knows how many turns its loops have.
    is_large = isinstance(array.size, int) and array.size > 2**14
    return jax.lax.optimization_barrier(array) if is_large else array
