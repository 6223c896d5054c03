"""How a call is laid out for the kernels.

Inside the kernels, logits are keys × queries. Each query is a lane, so its maximum and its
sum are one number of a row each, and no reduction crosses lanes. Queries and outputs are
transposed, with heads first. All G heads that share a key/value head are columns of one
block; they are *folded*. If an array depends on keys together with heads or queries, heads
are not folded, and each of them reads the block of keys that they share.

    queries   B × heads × H × columns        columns = blocks × fold × block_q
    keys      B × K × S × H
    values    B × K × D × S
    arrays    B or 1 × heads or 1 × 1 × columns (rows), 1 × S (columns) or S × columns
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jattn.implementations.joint import kind

LANES = 128  # numbers in a row of a vector register
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x · log₂ e)


class Plan(NamedTuple):
    """Sizes and numbers of blocks."""

    fold: int  # query heads in one block
    heads: int  # heads of the grid, each of `fold` query heads
    block_q: int  # queries in a block, of each folded head
    block_kv: int  # keys in a block
    queries: int  # blocks of queries
    keys: int  # blocks of keys
    halves: int = 1  # parts of a block of keys that can be skipped separately

    @property
    def columns(self) -> int:
        """Counts the columns of a block."""
        return self.fold * self.block_q

    @property
    def joined(self) -> "Plan":
        """Joins each two blocks of keys as the halves of one, if there are two."""
        if self.keys == 1:
            return self
        keys = -(-self.keys // 2)
        return self._replace(block_kv=2 * self.block_kv, keys=keys, halves=2)


def plan(sizes, fold: bool, blocks: tuple[int, int]) -> Plan:
    """Chooses blocks of about so many columns and keys, in whole rows of lanes."""
    G = sizes.G if fold else 1
    lanes = LANES // math.gcd(G, LANES)
    most = max(blocks[0] // (G * lanes), 1) * lanes
    block_q = min(most, -(-sizes.T // lanes) * lanes)
    block_kv = min(blocks[1], -(-sizes.S // LANES) * LANES)
    return Plan(
        G, sizes.N // G, block_q, block_kv, -(-sizes.T // block_q), -(-sizes.S // block_kv)
    )


def folds(arrays) -> bool:
    """Says whether heads can be folded into the columns of one block."""
    return all(
        kind(x) == "row" or (kind(x) == "column" and x.shape[1] == 1)
        for x in jax.tree.leaves(arrays)
    )


def arrange(array, plan: Plan):
    """Arranges an array aligned with BNTS for the kernels, in a dtype that they store."""
    what = kind(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.int8 if what == "tile" else jnp.int32)
    if array.dtype == jnp.bfloat16 and what != "tile":
        array = array.astype(jnp.float32)
    B, N, T = array.shape[:3]
    if what == "row":
        array = array[..., 0]
        array = array.reshape(B, plan.heads, plan.fold, T) if N > 1 else array[:, :, None]
        length = plan.block_q if T == 1 else plan.queries * plan.block_q
        shape = (*array.shape[:2], plan.fold, length)
        array = jnp.broadcast_to(array if T == 1 else _pad(array, 3, length), shape)
        return _columns(array, plan)
    array = _pad(array, 3, plan.keys * plan.block_kv)
    if what == "column":
        return array
    return jnp.swapaxes(_pad(array, 2, plan.queries * plan.block_q), 2, 3)


def queries(array, plan: Plan, fill=0):
    """Rearranges BTN… to B × heads × … × columns, padded with `fill`."""
    array = _pad(array, 1, plan.queries * plan.block_q, fill)
    B, T, _, *rest = array.shape
    array = array.reshape(B, plan.queries, plan.block_q, plan.heads, plan.fold, *rest)
    array = jnp.moveaxis(array, (3, 1, 4, 2), (1, -3, -2, -1))
    return array.reshape(B, plan.heads, *(rest or [1]), T * plan.fold)


def unqueries(array, plan: Plan, sizes, rest: tuple):
    """Rearranges B × heads × … × columns back to BTN…, without padding."""
    B = array.shape[0]
    blocks = (plan.queries, plan.fold, plan.block_q)
    array = array.reshape(B, plan.heads, *rest, *blocks)
    array = jnp.moveaxis(array, (1, -3, -2, -1), (3, 1, 4, 2))
    array = array.reshape(B, plan.queries * plan.block_q, sizes.N, *rest)
    return array[:, : sizes.T]


def keys(array, plan: Plan):
    """Rearranges BSK… to BKS…, padded with zeros."""
    return jnp.moveaxis(_pad(array, 1, plan.keys * plan.block_kv), 2, 1)


def unkeys(array, sizes):
    """Rearranges B × heads × S… back to BSK…; sums up heads that share a key head."""
    B, heads, S, size = array.shape
    array = array.reshape(B, sizes.K, heads // sizes.K, S, size)
    array = array[:, :, 0] if heads == sizes.K else jnp.sum(array, axis=2)
    return jnp.moveaxis(array, 1, 2)[:, : sizes.S]


def _columns(array, plan: Plan):
    """Rearranges B × heads × fold × T to B × heads × 1 × columns, block by block."""
    B, heads, fold, T = array.shape
    array = array.reshape(B, heads, fold, T // plan.block_q, plan.block_q)
    return jnp.swapaxes(array, 2, 3).reshape(B, heads, 1, fold * T)


def _pad(array, axis: int, length: int, fill=0):
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths, constant_values=fill) if widths[axis][1] else array
