"""Sums over the tiles of each row, in loops over blocks or in one loop over all tiles."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import is_one
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.strips import in_strips
from jattn.implementations.blockwise.tiles import (
    block_at,
    loop,
    over_all_tiles,
    over_heads,
    over_tiles,
)

# How many small tiles are computed at the same time. On Zen 5 with two cores, two rather
# than one take 0.7 to 1.06 of the time, and four 0.64 to 0.93 (rows of 64 to 512, jax
# 0.10.2 and 0.12.0.1).
JOINED = 4


def row_sums(layout: Layout, of_head, zeros, finish, *, bare=False, folded=False):
    """Sums up over the tiles of each row; gives arrays BTN….

    Args:
        layout: The call.
        of_head: `of_head(head)` gives `block(i)`, which gives for a block of queries a
            function `tile`, and `given`, what it reads of each row. Then
            `tile(layout, given, i, masked)(j, sums)` gives the sums with those of a tile.
        zeros: The sums of the rows of a block before its first tile.
        finish: Turns sums into results.
        bare: Whether `tile` takes None for the sums before the first tile.
        folded: Whether keys and values of a head stay BSK…, for one product of all heads.
    """
    plan, wide = layout.plan, layout.problem.wide
    run = _over_all_tiles if plan.flat else _over_blocks
    one_head = run(layout, of_head, zeros, finish, bare)
    results = jax.eval_shape(finish, zeros)
    whole = lambda x: jnp.zeros((*layout.query.shape[:3], *x.shape[3:]), wide)
    carry = jax.tree.map(whole, results)
    results = over_heads(layout, one_head, carry, folded, joined=JOINED)
    return tuple(map(layout.unqueries, results))


def _over_blocks(layout: Layout, of_head, zeros, finish, bare):
    """Gives the function of a head that loops over blocks of queries, and their tiles."""
    by_query, _ = schedules(layout)
    is_single = is_one(layout.counts["S"]) and layout.plan.cuts == 1
    start = None if bare and is_single else zeros

    def one_head(head, carry):
        block = of_head(head)

        def one_block(i, carry):
            tile, given = block(i)
            whole = functools.partial(tile, layout, given, i)
            strip = in_strips(layout, given, tile)
            count = layout.counts["S"]
            parts = finish(over_tiles(by_query, head, i, count, whole, start, strip))
            put = lambda whole, part: layout.put_rows(whole, part, T=i, **head.at)
            return jax.tree.map(put, carry, parts)

        return loop(layout.counts["T"], one_block, carry)

    return one_head


def _over_all_tiles(layout: Layout, of_head, zeros, finish, bare):
    """Gives the function of a head that loops over the tiles of all its blocks."""
    schedule, _ = schedules(layout)
    count = layout.counts["T"]
    is_single = bare and is_one(count) and is_one(layout.counts["S"])

    def one_head(head, carry):
        block = of_head(head)

        def add(masked):
            def body(i, j, blocks):
                sums = None if is_single else jax.tree.map(lambda x: block_at(x, i), blocks)
                tile, given = block(i)
                put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
                return jax.tree.map(put, blocks, tile(layout, given, i, masked)(j, sums))

            return body

        repeat = lambda x: jnp.broadcast_to(x, (count, *x.shape))
        blocks = jax.tree.map(repeat, zeros)
        parts = finish(over_all_tiles(layout, schedule, head, add, blocks))
        put = lambda whole, part: layout.put_row_blocks(whole, part, **head.at)
        return jax.tree.map(put, carry, parts)

    return one_head
