"""Which tiles are visited, and in which order.

A full tile is computed whole, and without the mask. A partial tile is cut into cells, and
the cells that the mask leaves empty are skipped. So large products serve where the mask
allows everything, and less is computed in vain along its edges.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.arrays.shapes import is_one
from jattn.blocks import of_call
from jattn.blocks.kinds import cut_last, module, resize, spread, visits
from jattn.implementations.blockwise.layout import Layout


class Cells(NamedTuple):
    """Cells to visit, for each step in B and K and each block of one side.

    Cell (`row`, `column`) is counted from the first query and the first key of the call.
    The first `live` cells count, and the others are empty, or are in full tiles.
    """

    row: jax.Array
    column: jax.Array
    live: jax.Array

    def at(self, b, k, i):
        """Gives the cells of one block, and how many of them count."""
        return tuple(_pick(x, b, k, i) for x in self)


class Schedule(NamedTuple):
    """Tiles to visit, for each step in B and K and each block of one side.

    `order` lists the tiles. The first `full` of them are full, the next ones up to `live`
    are partial, and the rest are empty.
    """

    order: jax.Array
    full: jax.Array
    live: jax.Array
    masked: bool  # whether a partial tile has a mask to apply; else a modifier hides it
    cells: Cells | None = None  # of the partial tiles, where these are cut

    def at(self, b, k, i):
        """Gives the order of one block, and where its full and its partial tiles end."""
        return tuple(_pick(x, b, k, i) for x in (self.order, self.full, self.live))

    def in_order(self) -> "Schedule":
        """Sorts the tiles by their place, and treats each of them as partial."""
        places = lax.broadcasted_iota(jnp.int32, self.order.shape, self.order.ndim - 1)
        last = self.order.shape[-1]
        order = jnp.sort(jnp.where(places < self.live[..., None], self.order, last))
        return self._replace(order=order, full=jnp.zeros_like(self.full))


def _pick(array, b, k, i):
    """Gives the entry of one block; an axis of length 1 serves all examples or heads."""
    b = 0 if array.shape[0] == 1 else b
    k = 0 if array.shape[1] == 1 else k
    return array[b, k, i]


def schedules(layout: Layout) -> tuple[Schedule | None, Schedule | None]:
    """Makes two schedules: by query block over key blocks, and the other way round.

    Both are None if no tile can be skipped and none is partial. If the plan is flat, both
    are one list of all tiles, as if they were of one block.
    """
    problem, plan, sizes = layout.problem, layout.plan, layout.problem.sizes
    if not (of_call.skips(problem, layout.operands) or layout.is_uneven):
        return None, None
    places = layout.operands.query_position, layout.operands.key_position
    if plan.banded and problem.near and places == (None, None):
        return _bands(layout, *problem.near)
    cells = _kinds(layout)
    xp: Any = module(cells)
    table = cells
    if sizes.are_known:
        table = resize(cells, (sizes.T, sizes.S), plan.cell, (plan.T, plan.S))
    table = xp.broadcast_to(
        table, (*table.shape[:2], layout.counts["T"], layout.counts["S"])
    )
    if layout.is_uneven:  # the last block shares columns, which its mask must hide
        table = cut_last(table)
    masked = problem.mask is not None or layout.is_uneven
    if plan.flat:
        flat = Schedule(*visits(table.reshape(*table.shape[:2], 1, -1)), masked)
        return flat, flat
    by_query = Schedule(*visits(table), masked)
    by_key = Schedule(*visits(xp.swapaxes(table, 2, 3)), masked)
    if plan.cuts == 1:
        return by_query, by_key
    live = _live(xp, spread(cells, (sizes.T, sizes.S), plan.cell), table, plan.cuts)
    partial = (table == of_call.PARTIAL)[:, :, :, None, :, None]
    # Where a block has one tile, XLA would compute its products before the loop over full
    # tiles, since they are the same in each turn. So this tile is always cut.
    chosen = lambda axis: live & (partial | is_one(layout.counts[axis]))
    by_query = by_query._replace(cells=_cells(xp, chosen("S"), 2))
    return by_query, by_key._replace(cells=_cells(xp, chosen("T"), 4))


def _bands(layout: Layout, before: int, after: int) -> tuple[Schedule, Schedule]:
    """Makes the two schedules of a window: the tiles that it reaches, all as partial ones.

    No table is needed. What else the mask hides there is little.
    """
    plan, counts = layout.plan, layout.counts
    by_query = _band(counts["T"], plan.T, counts["S"], plan.S, before, after)
    return by_query, _band(counts["S"], plan.S, counts["T"], plan.T, after, before)


def _band(count: int, size: int, others: int, other: int, before, after) -> Schedule:
    """Lists for each of `count` blocks the blocks of the other side that it reaches."""
    start = np.arange(count) * size
    first = np.clip((start - before) // other, 0, others - 1)
    last = np.clip((start + size - 1 + after) // other, 0, others - 1)
    live = last - first + 1
    order = first[:, None] + np.arange(np.max(live))
    arrays = order, np.zeros_like(live), live
    return Schedule(*(jnp.asarray(x[None, None], jnp.int32) for x in arrays), masked=True)


def _kinds(layout: Layout):
    """Finds the kinds of cells, for each step in B and K."""
    problem, plan = layout.problem, layout.plan
    cells = of_call.block_table(problem, layout.operands, *plan.cell)
    xp: Any = module(cells)
    cells = _common(xp, _common(xp, cells, 0, plan.B), 1, plan.K * plan.G)
    if problem.mask is None:  # a modifier hides pairs by −∞ logits, so no mask is applied
        cells = xp.where(cells == of_call.EMPTY, cells, xp.full_like(cells, of_call.FULL))
    return cells


def _common(xp, table, axis, size):
    """Merges each group of `size` kinds into one: partial where they differ."""
    if (isinstance(size, int) and size == 1) or table.shape[axis] == 1:
        return table
    shape = list(table.shape)
    shape[axis : axis + 1] = [table.shape[axis] // size, size]
    table = table.reshape(shape)
    low, high = xp.min(table, axis + 1), xp.max(table, axis + 1)
    return xp.where(low == high, low, xp.full_like(low, of_call.PARTIAL))


def _live(xp, cells, table, cuts: int):
    """Says which cells are not empty: … × row blocks × cuts × column blocks × cuts."""
    rows, columns = table.shape[2:]
    # Cells beyond the last query or the last key are empty.
    missing = [n * cuts - m for n, m in zip((rows, columns), cells.shape[2:], strict=True)]
    cells = xp.pad(cells, [(0, 0), (0, 0), *((0, x) for x in missing)])
    return (cells != of_call.EMPTY).reshape(*cells.shape[:2], rows, cuts, columns, cuts)


def _cells(xp, live, axis: int) -> Cells:
    """Lists the live cells for each block of the axis: 2 of queries, 4 of keys."""
    _, _, rows, cuts, columns, _ = live.shape
    row = xp.arange(rows * cuts).reshape(rows, cuts, 1, 1)
    column = xp.arange(columns * cuts).reshape(1, 1, columns, cuts)
    by_block = lambda x: xp.moveaxis(xp.broadcast_to(x, live.shape), axis, 2).reshape(
        *live.shape[:2], live.shape[axis], -1
    )
    row, column, live = map(by_block, (row, column, live))
    order = xp.argsort(~live, axis=-1, stable=True)  # live ones first
    row, column = (xp.take_along_axis(x, order, axis=-1) for x in (row, column))
    count = xp.sum(live, axis=-1)
    return Cells(*(jnp.asarray(x.astype(xp.int32)) for x in (row, column, count)))
