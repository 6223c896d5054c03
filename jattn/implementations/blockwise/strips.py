"""A strip of a partial tile: its rows, cut from those of its block of queries."""

import jax
from jax import lax

from jattn.implementations.blockwise.layout import Layout


def in_strips(layout: Layout, given, tile):
    """Makes the body of the loop over strips of a query block from that of its tiles.

    `tile(layout, given, row, masked)` gives the latter, for any layout; `given` is what
    it reads of each row of the block.
    """

    def of_width(width):
        strips = layout.in_strips(width)

        def body(row, column, sums):
            _, place = block_of(strips, row)
            cut = lambda x: part_of(strips, x, place)
            own, parts = jax.tree.map(cut, (given, sums))
            parts = tile(strips, own, row, masked=True)(column, parts)
            return jax.tree.map(lambda x, y: put_part(strips, x, y, place), sums, parts)

        return body

    return of_width


def block_of(layout: Layout, place):
    """Gives the block of queries that a tile is in, and its place in this block."""
    return (place, 0) if layout.per_block == 1 else divmod(place, layout.per_block)


def part_of(layout: Layout, rows, place, axis=2):
    """Cuts the rows of a tile from those of its block, BK(GT)…."""
    G, T = layout.plan.G, layout.plan.T
    if rows.shape[axis] == G * T:
        return rows
    rows = layout.by_head(rows, axis)
    rows = lax.dynamic_slice_in_dim(rows, place * T, T, axis + 1)
    return rows.reshape(*rows.shape[:axis], G * T, *rows.shape[axis + 2 :])


def put_part(layout: Layout, rows, part, place, axis=2):
    """Writes rows to the place that `part_of` reads."""
    if rows.shape == part.shape:
        return part
    whole, part = (layout.by_head(x, axis) for x in (rows, part))
    start = place * layout.plan.T
    whole = lax.dynamic_update_slice_in_dim(whole, part, start, axis + 1)
    return whole.reshape(rows.shape)
