"""Cotangents, tile by tile, over the rows that see each block of keys.

The logits of a tile are columns × rows here. So no product contracts the first axis of its
left operand, which would be slow on CPUs.

With eₛ = exp(logitₛ − top), total = Σₛ eₛ, and d_x for the cotangent of x:

    d_vₛ     = weightₛ d_output                     weightₛ = eₛ / total
    d_logitₛ = weightₛ (vₛ · d_output − δ + d_logsumexp)
    δ        = Σₛ weightₛ vₛ · d_output = output · d_output

where d_logsumexp = total · d_total, because logsumexp = top + log total. Without a
modifier logitₛ = scale · q·kₛ + biasₛ, and so

    d_q      = scale · Σₛ d_logitₛ kₛ
    d_kₛ     = scale · d_logitₛ q                   summed over the queries q
    d_scale  = Σ d_logitₛ q·kₛ                      summed over all pairs

The d_logitₛ of a row add up to d_logsumexp. So what keys have in common, c, need not be
multiplied by their errors. These are large in bfloat16, because δ is that of an output
whose weights were rounded, and the d_logitₛ are rounded too where products are narrow:

    Σₛ d_logitₛ kₛ = Σₛ d_logitₛ (kₛ − c) + d_logsumexp c

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands
from jattn.call.program import Arrays
from jattn.implementations import shared
from jattn.implementations.blockwise.common import common
from jattn.implementations.blockwise.cotangents import Rows, add_deltas, add_tile, keys_of
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.tiles import (
    Active,
    loop,
    over_all_tiles,
    over_heads,
    over_tiles,
)

# How many small tiles are computed at the same time. Two take 0.77 to 1.04 of the time of
# one after the other; four take up to 1.5 of it, for a tile has several arrays of its size.
JOINED = 2


def backward(layout: Layout, outputs, cotangents, wanted: Operands) -> Operands:
    """Computes the cotangents of the wanted operands; None for the others."""
    wide = layout.problem.wide
    _, order = schedules(layout)
    rows = _rows(layout, outputs, cotangents)
    d_active = _zeros(layout, wanted)
    # These cotangents sum over many pairs, so the rounding error of δ would add up.
    felt = wanted.scale or bool(jax.tree.leaves(d_active))
    felt = felt and not layout.problem.part  # whose tiles have a part of δ only

    def one_head(head, carry):
        d_query, *carry = carry
        head = head._replace(centre=_centre(layout, head))
        queries = Rows(*(layout.row_blocks(x, **head.at) for x in (layout.query, *rows)))
        d_output = layout.narrowed(queries.d_output)
        if not layout.narrow:  # here, and not before: so no array of all heads is made
            d_output = d_output * queries.inverse[..., None]
        queries = queries._replace(query=layout.scaled(queries.query), d_output=d_output)
        if felt:
            queries = queries._replace(delta=_deltas(layout, head, queries, order))
        # Summed up transposed, blocks × BKHR: see `_add_products`.
        d_rows = jnp.zeros_like(jnp.swapaxes(queries.query, -1, -2), wide)
        run = _over_all_tiles if layout.plan.flat else _over_blocks
        d_rows, *carry = run(layout, head, queries, order, (d_rows, *carry))
        d_rows = jnp.swapaxes(d_rows, -1, -2)
        if head.centre is not None:
            d_rows = d_rows + queries.d_logits[..., None] * head.centre[None]
        if not wanted.scale:  # d_scale needs d_query before it is scaled
            d_rows = d_rows * layout.operands.scale
        return layout.put_row_blocks(d_query, d_rows, **head.at), *carry

    carry = tuple(
        jnp.zeros(x.shape, wide) for x in (layout.query, layout.key, layout.value)
    )
    d_scale = jnp.zeros((), wide) if wanted.scale else None
    carry = *carry, d_active, d_scale
    results = over_heads(layout, one_head, carry, joined=JOINED)
    return _cotangents(layout, wanted, *results)


def _rows(layout: Layout, outputs, cotangents) -> tuple[jax.Array, ...]:
    """Computes the fields of `Rows` without the query, BTN… padded.

        d_logsumexp = d_total · total        δ = output · d_output

    Unless products are narrow, everything linear in the cotangents is divided by the total:
    once for each row, rather than once for each pair. `backward` does so with d_output.
    """
    output, top, total = outputs
    d_output, _, d_total = cotangents
    top, inverse = shared.factors_with_slope(top, total)
    d_logsumexp = d_logits = d_total * total
    divided = d_output
    if not layout.narrow:
        divided, d_logsumexp = d_output * inverse[..., None], d_logsumexp * inverse
    delta = shared.inner(divided, output)
    # Unless asked for more, a TPU rounds the numbers of a float32 product to 8 bits.
    is_coarse = not (layout.wide or layout.narrow) and total.dtype == jnp.float32
    eps = 2.0**-8 if is_coarse else float(jnp.finfo(total.dtype).eps)
    doubt = shared.doubts(total, output, d_output, eps)
    rows = d_output, top, inverse, doubt, delta, d_logsumexp, d_logits
    return tuple(map(layout.queries, rows))


def _centre(layout: Layout, head):
    """Gives c of each head, BK1H, in bfloat16; None where the sums of rows are unknown.

    A modifier changes the sum of a row, and a part of the keys has a part of it.
    """
    problem = layout.problem
    is_coarse = problem.dtype == jnp.bfloat16 and not problem.is_precise
    if not is_coarse or problem.modifier is not None or problem.part:
        return None
    return common(head.key, 2, problem.wide)


def _zeros(layout: Layout, wanted: Operands) -> Active:
    """Makes zeros for the wanted cotangents of what logits depend on; None for others."""
    pick = lambda want, x: jnp.zeros(x.shape, layout.problem.wide) if want else None
    wants = Active(wanted.bias, wanted.modifier.captured, wanted.modifier.aligned)
    pairs = zip(wants, _actives(layout), strict=True)
    return Active(*(jax.tree.map(pick, x, y) for x, y in pairs))


def _deltas(layout: Layout, head, queries: Rows, order):
    """Computes δ of each row from the products that δ will be subtracted from.

        δ = Σₛ weightₛ vₛ · d_output

    The shorter formula output · d_output has an equally small rounding error. But this
    error differs from that of the products, and the cotangents of the logits of a row
    would then not add up to the cotangent of its logsumexp.
    """
    tile = functools.partial(add_deltas, head, queries)

    def one_block(j, deltas):
        keys, strip = keys_of(layout, head, j), _strip(layout, head, tile)
        whole = lambda masked: lambda i, carry: tile(layout, masked, keys, (i, j), carry)
        return over_tiles(order, head, j, layout.counts["T"], whole, deltas, strip)

    deltas = jnp.zeros_like(queries.delta)
    if layout.plan.flat:
        keys = functools.partial(keys_of, layout, head)
        whole = lambda masked: lambda i, j, x: tile(layout, masked, keys(j), (i, j), x)
        return over_all_tiles(layout, order, head, whole, deltas)
    return loop(layout.counts["S"], one_block, deltas)


def _strip(layout: Layout, head, tile):
    """Makes the body of the loop over strips from that of tiles."""

    def of_width(width):
        strips = layout.in_strips(width)
        keys = functools.partial(keys_of, strips, head)
        return lambda i, j, carry: tile(strips, True, keys(j), (i, j), carry)

    return of_width


def _actives(layout: Layout) -> Active:
    """Gives what the logits depend on beside the products, for the whole call."""
    operands, aligned = layout.operands, layout.aligned
    return Active(aligned.bias, operands.modifier.captured, aligned.modifier)


def _over_all_tiles(layout, head, queries: Rows, order, carry):
    """Adds everything that a head contributes, in one loop over its tiles."""
    d_rows, d_key, d_value, *others = carry
    zeros = (jnp.zeros(x.shape, layout.problem.wide) for x in (head.key, head.value))
    tile = functools.partial(add_tile, head, queries, 0, layout)
    keys = functools.partial(keys_of, layout, head)
    body = lambda masked: lambda i, j, carry: tile(masked, keys(j), (i, j), carry)
    carry = over_all_tiles(layout, order, head, body, (d_rows, *zeros, *others))
    d_rows, key_part, value_part, *others = carry
    put = lambda whole, part: layout.put(whole, jnp.moveaxis(part, 1, 2), "BSK.", **head.at)
    return d_rows, put(d_key, key_part), put(d_value, value_part), *others


def _over_blocks(layout, head, queries: Rows, by_key, carry):
    """Adds everything that a head contributes, one block of keys after the other."""
    body = functools.partial(_backward_block, layout, head, queries, by_key)
    return loop(layout.counts["S"], body, carry)


def _backward_block(layout, head, queries: Rows, by_key, j, carry):
    """Adds everything that one block of keys contributes: loops over rows that see it."""
    d_rows, d_key, d_value, *others = carry
    keys = keys_of(layout, head, j)
    zeros = [jnp.zeros(x.shape, layout.problem.wide) for x in keys[:2]]
    tile = functools.partial(add_tile, head, queries, layout.first_key(j))
    whole = lambda masked: lambda i, carry: tile(layout, masked, keys, (i, j), carry)
    strip = _strip(layout, head, tile)
    start = (d_rows, *zeros, *others)
    carry = over_tiles(by_key, head, j, layout.counts["T"], whole, start, strip)
    d_rows, key_part, value_part, *others = carry
    # If uneven, the last block shares columns with another one, so it must not overwrite.
    write = layout.add if layout.is_uneven else layout.put
    put = lambda whole, part: write(whole, jnp.moveaxis(part, 1, 2), "BSK.", S=j, **head.at)
    return d_rows, put(d_key, key_part), put(d_value, value_part), *others


def _cotangents(layout, wanted, d_query, d_key, d_value, d_active, d_scale) -> Operands:
    """Turns the sums over tiles into cotangents of the operands."""
    operands, S = layout.operands, layout.problem.sizes.S
    d_query = layout.unqueries(d_query)
    if d_scale is not None:
        finite, _ = shared.isolate(operands.query)
        at_zero = shared.sum_all(
            d_query * finite.astype(d_query.dtype)
        )  # less precise, as its sums cancel more; only where the scale is 0
        # The tiles have summed up scale · d_scale.
        is_zero = operands.scale == 0
        d_scale = d_scale / jnp.where(is_zero, 1, operands.scale)
        d_scale = jnp.where(is_zero, at_zero, d_scale)
        d_query = d_query * operands.scale
    # Narrow queries are not scaled before the products, so their d_key is scaled here.
    d_key = d_key[:, :S] * (operands.scale if layout.narrow else 1)
    unalign: Any = lambda d, x: None if d is None else layout.unalign(d, x)
    nothing = jax.tree.map(lambda _: None, wanted)
    return nothing._replace(
        query=d_query,
        key=d_key,
        value=d_value[:, :S],
        scale=d_scale,
        bias=unalign(d_active.bias, operands.bias),
        modifier=Arrays(
            d_active.captured,
            tuple(map(unalign, d_active.modifier, operands.modifier.aligned)),
        ),
    )
