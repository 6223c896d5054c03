"""Tangents, tile by tile, from the known output, maximum and sum of each row.

With eₛ = exp(logitₛ − top), total = Σₛ eₛ, and ′ for tangents:

    mean    = Σₛ eₛ logitₛ′ / total
    total′  = total · mean
    output′ = (Σₛ eₛ (logitₛ′ − mean) vₛ + Σₛ eₛ vₛ′) / total

The mean is subtracted from each logit′ before the sum, because a difference of two sums
would lose digits by cancellation. The mean is a running mean. When a tile moves it by a
step, the sum so far becomes

    Σₛ eₛ (logitₛ′ − mean − step) vₛ = Σₛ eₛ (logitₛ′ − mean) vₛ − step · Σₛ eₛ vₛ
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands
from jattn.implementations import shared
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.products import products_of, rows_of, sums_of
from jattn.implementations.blockwise.rows import row_sums
from jattn.implementations.blockwise.tiles import Active, Tile, exponentials
from jattn.implementations.sums import quotient


def tangent(layout: Layout, outputs, tangents: Operands):
    """Computes the tangents of output, maximum and sum from those of the operands.

        query′ = scale · q′ + scale′ · q        maximum′ = 0
        total′ = total · mean                   output′ = (by_logits + by_values) / total

    A tangent of None is zero. The maximum is a constant in derivatives.
    """
    _, top, total = outputs
    top, inverse = shared.factors_with_slope(top, total)
    top = layout.queries(top)
    d_query, d_keys, d_active = _laid_out(layout, tangents)

    def of_head(head):
        cut = lambda x: jnp.moveaxis(layout.cut(x, "BSK.", **head.at), 2, 1)
        d_head = (*jax.tree.map(cut, d_keys), _cut_active(layout, d_active, **head.at))

        def block(i):
            rows = lambda x: layout.rows(x, T=i, **head.at)
            d_rows = None if d_query is None else rows(d_query)
            given = (layout.scaled(rows(layout.query)), rows(top), d_rows)
            return functools.partial(_tangent_tile, head, d_head), given

        return block

    wide, rows = layout.problem.wide, layout.rows_of_block
    numbers = jnp.zeros(rows, wide)
    vectors = jnp.zeros((*rows, layout.problem.sizes.D), wide)
    zeros = Sums(numbers, numbers, vectors, vectors, vectors)
    finish = lambda sums: (sums.mean, sums.by_logits + sums.by_values)
    mean, d_output = row_sums(layout, of_head, zeros, finish)
    return inverse[..., None] * d_output, jnp.zeros_like(total), total * mean


def _laid_out(layout: Layout, tangents: Operands):
    """Gives the tangents of scaled queries, of keys and values, and of other arrays."""
    wide = layout.problem.wide
    terms = []
    if tangents.query is not None:
        terms.append(tangents.query.astype(wide) * layout.operands.scale)
    if tangents.scale is not None:
        terms.append(layout.operands.query.astype(wide) * tangents.scale)
    d_query = layout.queries(sum(terms[1:], terms[0])) if terms else None
    d_keys = tuple(
        None if x is None else layout.keys(x.astype(wide))
        for x in (tangents.key, tangents.value)
    )
    align = lambda x: None if x is None else layout.align(x)
    aligned = tuple(map(align, tangents.modifier.aligned))
    d_active = Active(align(tangents.bias), tangents.modifier.captured, aligned)
    return d_query, d_keys, d_active


class Sums(NamedTuple):
    """Running sums over the tiles of a query block."""

    total: jax.Array  # Σₛ eₛ, BKR
    mean: jax.Array  # Σₛ eₛ logitₛ′ / Σₛ eₛ, BKR
    by_logits: jax.Array  # Σₛ eₛ (logitₛ′ − mean) vₛ, BKRD
    by_values: jax.Array  # Σₛ eₛ vₛ′, BKRD
    output: jax.Array  # Σₛ eₛ vₛ, BKRD


def _tangent_tile(head, d_head, layout, given, i, masked):
    """Makes the body of the loop over the tiles of one query block."""
    _, top, _ = given
    _, d_values, _ = d_head

    def body(j, sums):
        view = Tile(layout, head.aligned, i, j)
        allowed = view.allowed() if masked else None
        logits, d_logits = _logits(view, head, d_head, given, allowed)
        weights = exponentials(logits, top[..., None])
        d_logits = d_logits - sums.mean[..., None]
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0)
            d_logits = jnp.where(allowed, d_logits, 0)
        values = (None if x is None else _cut(layout, x, j) for x in (head.value, d_values))
        return _add(view, sums, weights, d_logits, values, allowed)

    return body


def _cut(layout: Layout, keys, j):
    return layout.cut(keys, "BKS.", S=j).astype(layout.problem.wide)


def _logits(view: Tile, head, d_head, given, allowed):
    """Computes the logits of a tile and their tangents.

    The tangents of the products are query′ · kₛ + scale · q · kₛ′. Modifier and bias turn
    them into the tangents of the logits.
    """
    layout = view.layout
    query, _, d_query = given
    d_keys, _, d_actives = d_head
    products = products_of(layout, query, layout.cut(head.key, "BKS.", S=view.j))
    if allowed is not None and layout.problem.modifier is not None:
        products = shared.harmless(products, allowed)
    if layout.narrow_logits:  # these queries are not scaled yet
        query = query.astype(layout.problem.wide) * layout.operands.scale
    d_products = jnp.zeros_like(products)
    if d_query is not None:
        key = _cut(layout, head.key, view.j)
        d_products += rows_of(d_query, key, products.dtype)
    if d_keys is not None:
        d_key = _cut(layout, d_keys, view.j)
        d_products += rows_of(query, d_key, products.dtype)
    d_active = _cut_active(layout, d_actives, T=view.i, S=view.j)
    chosen = view.active.where(d_active)
    d_active = jax.tree.map(lambda d, x: d.astype(x.dtype), d_active, chosen)
    return jax.jvp(
        lambda x, chosen: view.logits(x, chosen.fill(view.active)),
        (products, chosen),
        (d_products, d_active),
    )


def _add(view: Tile, old: Sums, weights, d_logits, values, allowed) -> Sums:
    """Adds a tile to the sums of its rows.

    The weights are the exponentials eₛ, not yet divided by the total. `d_logits` is
    logitₛ′ − mean, with the mean so far.
    """
    value, d_value = values
    flat = view.layout.plan.flat
    sums = lambda x, value: sums_of(view.drop(x), value, allowed, unasked=flat)
    total = old.total + jnp.sum(weights, axis=-1)
    # step = Σₛ eₛ (logitₛ′ − mean) / total: how far this tile moves the running mean.
    step = quotient(jnp.sum(weights * d_logits, axis=-1), total)
    # With the new mean: by_logits = Σₛ eₛ (logitₛ′ − mean − step) vₛ.
    d_weights = weights * (d_logits - step[..., None])
    by_logits = old.by_logits - step[..., None] * old.output + sums(d_weights, value)
    by_values = old.by_values
    if d_value is not None:
        by_values = by_values + sums(weights, d_value)
    output = old.output + sums(weights, value)
    return Sums(total, old.mean + step, by_logits, by_values, output)


def _cut_active(layout: Layout, active: Active, **at) -> Active:
    """Cuts the part of aligned arrays at the blocks `at`."""
    cut = lambda x: layout.cut(x, "BKGTS", **at)
    return active._replace(
        bias=jax.tree.map(cut, active.bias), modifier=jax.tree.map(cut, active.modifier)
    )
