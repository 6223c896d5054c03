"""Which tiles are visited, and in which order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks import of_call
from jattn.implementations.blockwise.layout import Layout


class Schedule(NamedTuple):
    """Tiles to visit, for each step in B and K and each block of one side.

    `order` lists the tiles. The first `full` of them are full, the next ones up to `live`
    are partial, and the rest are empty.
    """

    order: jax.Array
    full: jax.Array
    live: jax.Array
    masked: bool  # whether a partial tile has a mask to apply; else a modifier hides it

    def at(self, b, k, i):
        """Gives the order of one block, and where its full and its partial tiles end."""
        b = 0 if self.full.shape[0] == 1 else b
        k = 0 if self.full.shape[1] == 1 else k
        return self.order[b, k, i], self.full[b, k, i], self.live[b, k, i]

    def in_order(self) -> "Schedule":
        """Sorts the tiles by their place, and treats each of them as partial."""
        places = lax.broadcasted_iota(jnp.int32, self.order.shape, self.order.ndim - 1)
        last = self.order.shape[-1]
        order = jnp.sort(jnp.where(places < self.live[..., None], self.order, last))
        return self._replace(order=order, full=jnp.zeros_like(self.full))


def schedules(layout: Layout) -> tuple[Schedule | None, Schedule | None]:
    """Makes two schedules: by query block over key blocks, and the other way round.

    Both are None if no tile can be skipped and none is partial.
    """
    problem, plan = layout.problem, layout.plan
    if not (of_call.skips(problem, layout.operands) or layout.is_uneven):
        return None, None
    table = of_call.block_table(problem, layout.operands, plan.T, plan.S)
    xp = np if isinstance(table, np.ndarray) else jnp
    table = xp.broadcast_to(
        table, (*table.shape[:2], layout.counts["T"], layout.counts["S"])
    )
    table = _common(xp, _common(xp, table, 0, plan.B), 1, plan.K * plan.G)
    if problem.mask is None:  # a modifier hides pairs by −∞ logits, so no mask is applied
        table = xp.where(table == of_call.EMPTY, table, xp.full_like(table, of_call.FULL))
    if layout.is_uneven:  # the last block shares columns, which its mask must hide
        last = xp.arange(table.shape[-1]) == table.shape[-1] - 1
        table = xp.where(last, xp.minimum(table, of_call.PARTIAL), table)
    masked = problem.mask is not None or layout.is_uneven
    return _schedule(xp, table, masked), _schedule(xp, xp.swapaxes(table, 2, 3), masked)


def _common(xp, table, axis, size):
    """Merges each group of `size` kinds into one: partial where they differ."""
    if (isinstance(size, int) and size == 1) or table.shape[axis] == 1:
        return table
    shape = list(table.shape)
    shape[axis : axis + 1] = [table.shape[axis] // size, size]
    table = table.reshape(shape)
    low, high = xp.min(table, axis + 1), xp.max(table, axis + 1)
    return xp.where(low == high, low, xp.full_like(low, of_call.PARTIAL))


def _schedule(xp, table, masked: bool) -> Schedule:
    # A stable sort by FULL − kind: full tiles first, then partial ones, then empty ones.
    order = xp.argsort(of_call.FULL - table, axis=-1, stable=True).astype(xp.int32)
    full = xp.sum(table == of_call.FULL, axis=-1, dtype=xp.int32)
    live = xp.sum(table != of_call.EMPTY, axis=-1, dtype=xp.int32)
    return Schedule(jnp.asarray(order), jnp.asarray(full), jnp.asarray(live), masked)
