"""Cotangents, tile by tile, over the rows that see each block of keys.

Logits are columns × rows here, so that no product contracts the first axis of its left
operand, which is slow on CPUs.

With eₛ = exp(logitₛ − top), which add up to the total, and d_x for cotangents:

    d_vₛ     = weightₛ d_output                     weightₛ = eₛ / total
    d_logitₛ = weightₛ (vₛ · d_output − δ + d_logsumexp)
    δ        = Σₛ weightₛ vₛ · d_output = output · d_output

where d_logsumexp is total · d_total, as logsumexp = top + log total.

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands
from jattn.call.program import Arrays
from jattn.implementations import shared
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.tiles import (
    Active,
    Tile,
    columns_of,
    dot,
    exponentials,
    loop,
    over_heads,
    over_tiles,
)


def backward(layout: Layout, outputs, cotangents, wanted: Operands) -> Operands:
    """The cotangents of the wanted operands; None for the others."""
    wide = layout.problem.wide
    _, by_key = schedules(layout)
    top, inverse, settled, *deltas = shared.row_numbers(outputs, cotangents)
    d_output = cotangents[0]
    if not layout.narrow:  # once for each row, not for each pair
        d_output, *deltas = d_output * inverse[..., None], *(inverse * x for x in deltas)
    rows = (d_output, top, inverse, settled, *deltas)
    rows = tuple(map(layout.queries, rows))
    actives = _actives(layout)
    pick = lambda want, x: jnp.zeros(x.shape, wide) if want else None
    wants = Active(wanted.bias, wanted.modifier.captured, wanted.modifier.aligned)
    d_active = Active(
        *(jax.tree.map(pick, x, y) for x, y in zip(wants, actives, strict=True))
    )

    def one_head(head, carry):
        d_query, *carry = carry
        queries = tuple(layout.row_blocks(x, **head.at) for x in (layout.query, *rows))
        queries = (layout.scaled(queries[0]), layout.narrowed(queries[1]), *queries[2:])
        d_rows = jnp.zeros_like(jnp.swapaxes(queries[0], -1, -2), wide)
        body = functools.partial(_backward_block, layout, head, queries, by_key)
        d_rows, *carry = loop(layout.counts["S"], body, (d_rows, *carry))
        d_rows = jnp.swapaxes(d_rows, -1, -2)
        if not wanted.scale:  # else that of the scale is made of these first
            d_rows = d_rows * layout.operands.scale
        return layout.put_row_blocks(d_query, d_rows, **head.at), *carry

    carry = tuple(
        jnp.zeros(x.shape, wide) for x in (layout.query, layout.key, layout.value)
    )
    d_scale = jnp.zeros((), wide) if wanted.scale else None
    results = over_heads(layout, one_head, (*carry, d_active, d_scale))
    return _cotangents(layout, wanted, *results)


def _actives(layout: Layout) -> Active:
    operands, aligned = layout.operands, layout.aligned
    return Active(aligned.bias, operands.modifier.captured, aligned.modifier)


def _backward_block(layout, head, queries, by_key, j, carry):
    """All that one block of keys adds: a loop over the rows that see it."""
    d_rows, d_key, d_value, *others = carry
    key = layout.narrowed(layout.cut(head.key, "BKS.", S=j))
    value = layout.narrowed(layout.cut(head.value, "BKS.", S=j))
    wide = layout.problem.wide
    body = functools.partial(_backward_tile, layout, head, queries, (key, value), j)
    start = (d_rows, jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide), *others)
    carry = over_tiles(by_key, head, j, layout.counts["T"], body, start)
    d_rows, key_part, value_part, *others = carry
    write = layout.add if layout.is_uneven else layout.put
    put = lambda whole, part: write(whole, jnp.moveaxis(part, 1, 2), "BSK.", S=j, **head.at)
    return d_rows, put(d_key, key_part), put(d_value, value_part), *others


def _backward_tile(layout, head, queries, keys, j, masked):
    """The body of the loop over the tiles of one block of keys."""
    wide = layout.problem.wide
    isolated = masked and layout.problem.mask is not None

    def body(i, carry):
        d_rows, d_key, d_value, d_active, d_scale = carry
        query, d_output, top, inverse, *deltas = (_at(x, i) for x in queries)
        key, value = keys
        view = Tile(layout, head.aligned, i, j, columns_first=True)
        allowed = view.allowed() if masked else None
        keep_allowed = lambda x: x if allowed is None else jnp.where(allowed, x, 0)
        products = columns_of(query, key, wide)
        products = products * layout.operands.scale if layout.narrow else products
        if layout.problem.modifier is not None:
            products = shared.harmless(products, allowed)
        chosen = jax.tree.map(
            lambda total, x: None if total is None else x,
            d_active,
            view.active,
            is_leaf=lambda x: x is None,
        )
        logits, pull = jax.vjp(
            lambda x, chosen: view.logits(x, chosen.fill(view.active)), products, chosen
        )
        if isolated:  # what follows mixes rows, and columns, by products with zeros
            query, key = shared.isolate(query)[0], shared.isolate(key)[0]
            d_clean, poison = shared.isolate(d_output)
            top = top + poison.astype(wide)
        else:
            d_clean = d_output
        row = lambda x: x[..., None, :]
        powers = exponentials(logits, row(top))
        weights = powers * row(inverse) if layout.narrow else powers
        weights = keep_allowed(weights)
        d_weights = view.drop(dot("BKSD,BKRD->BKSR", value, d_output, wide))
        settled, delta, offset = map(row, deltas)
        d_weights = jnp.where(powers > settled, delta, d_weights)
        d_logits = keep_allowed(weights * (d_weights - offset))
        d_products, d_chosen = pull(d_logits)
        if layout.problem.modifier is not None:
            d_products = keep_allowed(d_products)
        if d_scale is not None:  # times the scale
            d_scale = d_scale + shared.sum_all(keep_allowed(d_products * products))
        d_products = layout.narrowed(d_products)
        dropped = layout.narrowed(view.drop(weights))
        d_key = d_key + dot("BKSR,BKRH->BKSH", d_products, query, wide)
        d_value = d_value + dot("BKSR,BKRD->BKSD", dropped, d_clean, wide)
        key = jnp.swapaxes(key, 2, 3)
        d_row = _at(d_rows, i) + dot("BKHS,BKSR->BKHR", key, d_products, wide)
        d_rows = lax.dynamic_update_index_in_dim(d_rows, d_row, i, 0)
        d_active = _add_active(layout, d_active, d_chosen, T=i, S=j, **head.at)
        return d_rows, d_key, d_value, d_active, d_scale

    return body


def _add_active(layout: Layout, whole: Active, part: Active, **at) -> Active:
    """Adds the derivatives of one tile to their sums."""
    add = lambda whole, part: layout.add(whole, part, "BKGTS", **at)
    return Active(
        jax.tree.map(add, whole.bias, part.bias),
        jax.tree.map(lambda x, y: x + y.astype(x.dtype), whole.captured, part.captured),
        jax.tree.map(add, whole.modifier, part.modifier),
    )


def _at(blocks, i):
    return lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)


def _cotangents(layout, wanted, d_query, d_key, d_value, d_active, d_scale) -> Operands:
    """Sums over tiles as cotangents of the operands."""
    operands, S = layout.operands, layout.problem.sizes.S
    d_query = layout.unqueries(d_query)
    if d_scale is not None:
        finite = jnp.where(jnp.isfinite(operands.query), operands.query, 0)
        at_zero = shared.sum_all(
            d_query * finite.astype(d_query.dtype)
        )  # where sums cancel more
        is_zero = operands.scale == 0
        d_scale = d_scale / jnp.where(is_zero, 1, operands.scale)
        d_scale = jnp.where(is_zero, at_zero, d_scale)
        d_query = d_query * operands.scale
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
