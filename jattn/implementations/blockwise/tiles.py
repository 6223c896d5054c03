"""One tile: its logits, mask and dropout, its products; and the loops over tiles."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import is_one
from jattn.call.program import Arrays, Index
from jattn.dropout import keep
from jattn.implementations import shared
from jattn.implementations.blockwise.layout import Aligned, Layout


class Active(NamedTuple):
    """Arrays that the logits of a tile depend on beside products; None where constant."""

    bias: Any
    captured: Any
    modifier: Any

    def where(self, other: "Active") -> "Active":
        """Picks the arrays of this one where the other has an array; None elsewhere."""
        pick = lambda other, mine: None if other is None else mine
        return jax.tree.map(pick, other, self, is_leaf=lambda x: x is None)

    def fill(self, other: "Active") -> "Active":
        """Fills the places that are None with the arrays of the other."""
        pick = lambda mine, other: other if mine is None else mine
        return jax.tree.map(pick, self, other, is_leaf=lambda x: x is None)


class Tile:
    """One tile's logits, mask and dropout, for rows × columns or columns × rows."""

    def __init__(self, layout: Layout, aligned: Aligned, i, j, columns_first=False):
        cut = lambda x: layout.cut(x, "BKGTS", T=i, S=j)
        self.layout, self.problem = layout, layout.problem
        self.i, self.j = i, j
        self.part = jax.tree.map(cut, aligned)
        self.lay = functools.partial(layout.lay, columns_first=columns_first)
        self.index = Index(*map(self.lay, self.part.index))

    @property
    def active(self) -> Active:
        """Gives every array that the logits depend on beside the products."""
        captured = self.layout.operands.modifier.captured
        return Active(self.part.bias, captured, self.part.modifier)

    def logits(self, products, active: Active):
        """Computes the logits from scaled products: applies the modifier, then the bias."""
        logits = products
        if self.problem.modifier is not None:
            arrays = Arrays(active.captured, tuple(map(self.lay, active.modifier)))
            logits = self.problem.modifier(arrays, self.index, products)
            logits = jnp.broadcast_to(logits, products.shape).astype(products.dtype)
            logits = shared.rounded(logits)
        return logits if active.bias is None else logits + self.lay(active.bias)

    def allowed(self):
        """Says which pairs count: the mask allows them, and the block owns the key."""
        allowed = None
        if self.problem.mask is not None:
            captured = self.layout.operands.mask.captured
            arrays = Arrays(captured, tuple(map(self.lay, self.part.mask)))
            allowed = self.problem.mask(arrays, self.index)
        if self.layout.is_uneven:
            own = self.lay(self.layout.is_own(self.j))
            allowed = own if allowed is None else allowed & own
        return allowed

    def drop(self, weights):
        """Applies dropout: kept weights times 1 / (1 − rate), 0 for the others."""
        if self.part.words is None:
            return weights
        return self.kept(weights / (1 - self.problem.rate))

    def kept(self, weights):
        """Gives the weights that dropout keeps, 0 for the others."""
        if self.part.words is None:
            return weights
        queries, keys = map(self.lay, self.part.words)
        return jnp.where(keep(queries, keys, self.problem.rate), weights, 0)


class Head(NamedTuple):
    """Arrays of some examples and some key/value heads of a call."""

    at: dict
    key: jax.Array  # BKSH
    value: jax.Array  # BKSD
    aligned: Aligned
    # What keys have in common, BK1H, in `backward`; values, BK1D, in `forward`.
    centre: jax.Array | None = None


def over_heads(layout: Layout, body, carry, folded=False, joined: int = 1):
    """Runs `body(head, carry)` for every step in B and K; folded keys stay BSK….

    Where each step has one small tile, a turn of the loop joins so many steps. XLA:CPU
    multiplies small matrices by one thread, but runs steps at the same time that do not
    wait for each other.
    """
    counts, plan = layout.counts, layout.plan
    is_small = plan.B * plan.K != 1 and not plan.flat and not plan.folded
    joined = joined if is_small and is_one(counts["T"]) and is_one(counts["S"]) else 1

    def step(index, carry):
        b, k = index // counts["K"], index % counts["K"]
        cut = lambda x, axes: layout.cut(x, axes, B=b, K=k)
        aligned = jax.tree.map(lambda x: cut(x, "BKGTS"), layout.aligned)
        key, value = cut(layout.key, "BSK."), cut(layout.value, "BSK.")
        if not folded:
            key, value = jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1)
        return body(Head({"B": b, "K": k}, key, value, aligned), carry)

    return loop(counts["B"] * counts["K"], step, carry, joined)


def loop(count, body, carry, joined: int = 1):
    """Runs a loop, whose turns join so many steps; a single step needs no loop."""
    if is_one(count):
        return body(0, carry)
    unroll = joined if joined > 1 and isinstance(count, int) else None
    return lax.fori_loop(0, count, body, carry, unroll=unroll)


def over_tiles(schedule, head: Head, i, count, body, carry, strip=None):
    """Runs `body(masked)(j, carry)` over the tiles of block `i` that are not empty.

    Where `strip` is given and partial tiles are cut, `strip(width)(row, column, carry)`
    runs over their strips of so many cells.
    """
    if schedule is None:
        return loop(count, body(False), carry)
    is_cut = strip is not None and schedule.strips is not None
    if is_one(count) and not is_cut:  # apply the mask without asking whether it is needed
        return body(schedule.masked)(0, carry)
    where = head.at["B"], head.at["K"], i
    order, full, live = schedule.at(*where)
    at = lambda masked: lambda turn, carry: body(masked)(order[turn], carry)
    if is_cut:
        if not is_one(count):  # a single tile is always cut, see `schedules`
            carry = lax.fori_loop(0, full, at(False), carry)
        return schedule.strips.visit(where, strip, carry)
    if not schedule.masked:
        return lax.fori_loop(0, live, at(False), carry)
    carry = lax.fori_loop(0, full, at(False), carry)
    return lax.fori_loop(full, live, at(True), carry)


def over_all_tiles(layout: Layout, schedule, head: Head, body, carry):
    """Runs `body(masked)(i, j, carry)` over the tiles of all blocks that are not empty."""
    rows, columns = layout.counts["T"], layout.counts["S"]
    step = lambda masked: lambda x, carry: body(masked)(*divmod(x, columns), carry)
    return over_tiles(schedule, head, 0, rows * columns, step, carry)


def block_at(blocks, i):
    """Gives the part of one block, from an array of all blocks."""
    return lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)


@jax.custom_jvp
def _at_most_zero(x):
    return jnp.minimum(x, 0)


# The derivative is always 1: `minimum` would have 1/2 at 0 and 0 above.
_at_most_zero.defjvp(lambda x, d: (_at_most_zero(*x), *d))


def exponentials(logits, top):
    """Computes exp(logits − top), at most 1.

    `top` is the maximum that the forward pass found. Logits that are computed again may
    differ from those by a rounding error, and one of them may then be larger than `top`.
    For logits of 1e8 the last place is 8, and exp(8) ≈ 3000. So the difference is cut off
    at 0.
    """
    return jnp.exp(_at_most_zero(logits - top))
