"""Which tiles are visited, and in which order.

A full tile is computed whole, and without the mask. A partial tile is cut into strips of
queries. A strip is computed with its span of keys: from the first to the last cell that
the mask does not leave empty. So large products serve where the mask allows everything,
and less is computed in vain along its edges.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.arrays.shapes import is_one
from jattn.blocks import of_call
from jattn.blocks.kinds import cut_last, module, resize, spread, visits
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import without_bands


class Strips(NamedTuple):
    """Strips to visit, for each step in B and K and each block of one side.

    They are in the order of their width in cells, and the first ones have the width 1.
    """

    row: jax.Array  # which strip, counted from the first query of the call
    column: jax.Array  # the first cell of its span, counted from the first key
    ends: jax.Array  # how many strips have at most 0, 1, 2, … cells

    def visit(self, where, strip, carry):
        """Runs `strip(width)(row, column, carry)` over the strips of one block."""
        row, column, ends = (_pick(x, *where) for x in self)

        def of_width(width):
            body = strip(width)
            return lambda turn, carry: body(row[turn], column[turn], carry)

        # A loop for each width: a branch in one loop would copy what the loop carries.
        for width in range(1, ends.shape[0]):
            ends_here = ends[width - 1], ends[width]
            carry = lax.fori_loop(*ends_here, of_width(width), carry)
        return carry


class Schedule(NamedTuple):
    """Tiles to visit, for each step in B and K and each block of one side.

    `order` lists the tiles. The first `full` of them are full, the next ones up to `live`
    are partial, and the rest are empty.
    """

    order: jax.Array
    full: jax.Array
    live: jax.Array
    masked: bool  # whether a partial tile has a mask to apply; else a modifier hides it
    strips: Strips | None = None  # of the partial tiles, where these are cut

    def at(self, b, k, i):
        """Gives the order of one block, and where its full and its partial tiles end."""
        return tuple(_pick(x, b, k, i) for x in (self.order, self.full, self.live))

    def in_order(self) -> "Schedule":
        """Sorts the tiles by their place, and treats each of them as partial."""
        places = lax.broadcasted_iota(jnp.int32, self.order.shape, self.order.ndim - 1)
        last = jnp.iinfo(jnp.int32).max  # after every block: a band lists few of many
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
    cells = _kinds(layout, plan.cell)
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
    by_query = by_query._replace(strips=_strips(xp, chosen("S"), 2))
    return by_query, by_key._replace(strips=_strips(xp, chosen("T"), 4))


def _bands(layout: Layout, before: int, after: int) -> tuple[Schedule, Schedule]:
    """Makes the two schedules of a window: the tiles that it reaches, all as partial ones.

    A table of so many small tiles would take long. What else the mask hides, a table of
    larger cells tells.
    """
    plan, sizes = layout.plan, layout.problem.sizes
    cell = without_bands(layout.problem, spread=False).cell
    kinds = spread(_kinds(layout, cell), (sizes.T, sizes.S), cell)
    rows, columns = Side(sizes.T, plan.T, cell[0]), Side(sizes.S, plan.S, cell[1])
    by_query = _band(kinds, rows, columns, before, after)
    kinds = module(kinds).swapaxes(kinds, 2, 3)
    return by_query, _band(kinds, columns, rows, after, before)


class Side(NamedTuple):
    """Queries or keys: how many there are, in a tile, and in a cell of the table."""

    length: int
    tile: int
    cell: int

    def cells(self, tile):
        """Lists the cells that a tile overlaps, the last one again where they are fewer."""
        last = (np.minimum((tile + 1) * self.tile, self.length) - 1) // self.cell
        first = tile * self.tile // self.cell
        return [np.minimum(first + k, last) for k in range(np.max(last - first) + 1)]


def _band(kinds, side: Side, other: Side, before: int, after: int) -> Schedule:
    """Lists for each block of a side the blocks of the other side that it reaches."""
    xp: Any = module(kinds)
    block = np.arange(-(-side.length // side.tile))[:, None]
    most = -(-other.length // other.tile) - 1
    start = block * side.tile
    first = np.clip((start - before) // other.tile, 0, most)
    last = np.clip((start + side.tile - 1 + after) // other.tile, 0, most)
    order = first + np.arange(np.max(last - first) + 1)
    inside = np.minimum(order, last)  # whose cells exist
    # A tile is empty if all the cells are that it overlaps.
    places = itertools.product(side.cells(block), other.cells(inside))
    is_empty = [kinds[:, :, x, y] == of_call.EMPTY for x, y in places]
    live = ~functools.reduce(xp.logical_and, is_empty) & (order <= last)[None, None]
    turns = xp.argsort(~live, axis=-1, stable=True)
    order = xp.take_along_axis(xp.broadcast_to(order, live.shape), turns, axis=-1)
    count = xp.sum(live, axis=-1)
    arrays = order, xp.zeros_like(count), count
    return Schedule(*(jnp.asarray(x.astype(np.int32)) for x in arrays), masked=True)


def _kinds(layout: Layout, cell):
    """Finds the kinds of cells, for each step in B and K."""
    problem, plan = layout.problem, layout.plan
    cells = of_call.block_table(problem, layout.operands, *cell)
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


def _strips(xp, live, axis: int) -> Strips:
    """Lists the strips that are not empty for each block of the axis: 2 queries, 4 keys."""
    _, _, rows, cuts, columns, _ = live.shape
    first, last = xp.argmax(live, -1), cuts - 1 - xp.argmax(live[..., ::-1], -1)
    width = xp.where(xp.any(live, -1), last - first + 1, cuts + 1)
    row = xp.arange(rows * cuts).reshape(1, 1, rows, cuts, 1)
    column = (xp.arange(columns) * cuts).reshape(1, 1, 1, 1, columns) + first
    by_block = lambda x: xp.moveaxis(xp.broadcast_to(x, width.shape), axis, 2).reshape(
        *width.shape[:2], width.shape[axis], -1
    )
    row, column, width = map(by_block, (row, column, width))
    order = xp.argsort(width, axis=-1, stable=True)
    row, column = (xp.take_along_axis(x, order, axis=-1) for x in (row, column))
    limit = xp.arange(cuts + 1).reshape(1, 1, 1, cuts + 1, 1)
    ends = xp.sum(width[..., None, :] <= limit, -1)
    return Strips(*(jnp.asarray(x.astype(xp.int32)) for x in (row, column, ends)))
