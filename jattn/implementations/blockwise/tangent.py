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
from jattn.implementations.blockwise.cells import in_cell
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.tiles import (
    Active,
    Tile,
    dot,
    exponentials,
    loop,
    over_heads,
    over_tiles,
    products_of,
    sums_of,
)


def tangent(layout: Layout, outputs, tangents: Operands):
    """Computes the tangents of output, maximum and sum from those of the operands.

        query′ = scale · q′ + scale′ · q        maximum′ = 0
        total′ = total · mean                   output′ = (by_logits + by_values) / total

    A tangent of None is zero. The maximum is a constant in derivatives.
    """
    by_query, _ = schedules(layout)
    _, top, total = outputs
    top = layout.queries(top)
    d_query, d_keys, d_active = _laid_out(layout, tangents)

    def zeros(rows):
        numbers = jnp.zeros(rows, layout.problem.wide)
        sums = jnp.zeros((*rows, layout.problem.sizes.D), layout.problem.wide)
        return Sums(numbers, numbers, sums, sums, sums)

    def one_head(head, carry):
        cut = lambda x: jnp.moveaxis(layout.cut(x, "BSK.", **head.at), 2, 1)
        d_head = (*jax.tree.map(cut, d_keys), _cut_active(layout, d_active, **head.at))

        def one_block(i, carry):
            rows = lambda x: layout.rows(x, T=i, **head.at)
            query = layout.scaled(rows(layout.query))
            d_rows = None if d_query is None else rows(d_query)
            given = (query, rows(top), d_rows)
            body = functools.partial(_tangent_tile, layout, head, d_head, given, i)
            cell = functools.partial(_tangent_cell, layout, head, d_head, given)
            start = zeros(query.shape[:3])
            sums = over_tiles(by_query, head, i, layout.counts["S"], body, start, cell)
            parts = sums.mean, sums.by_logits + sums.by_values
            return tuple(
                layout.put_rows(whole, part, T=i, **head.at)
                for whole, part in zip(carry, parts, strict=True)
            )

        return loop(layout.counts["T"], one_block, carry)

    start = zeros(layout.query.shape[:3])
    results = over_heads(layout, one_head, (start.mean, start.by_values))
    mean, d_output = map(layout.unqueries, results)
    inverse, _ = shared.row_factors(total)
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


def _tangent_tile(layout, head, d_head, given, i, masked):
    """Makes the body of the loop over the tiles of one query block.

    The tangents of the products are query′ · kₛ + scale · q · kₛ′. Modifier and bias turn
    them into the tangents of the logits.
    """
    wide = layout.problem.wide
    d_keys, d_values, d_actives = d_head

    def body(j, carry):
        total, mean, by_logits, by_values, output = carry
        query, top, d_query = given
        cut = lambda x: None if x is None else layout.cut(x, "BKS.", S=j).astype(wide)
        key, value, d_key, d_value = map(cut, (head.key, head.value, d_keys, d_values))
        view = Tile(layout, head.aligned, i, j)
        products, allowed = products_of(layout, query, key), None
        if masked:
            allowed = view.allowed()
            if layout.problem.modifier is not None:
                products = shared.harmless(products, allowed)
        d_products = _of_products(query, key, d_query, d_key, products)
        d_active = _cut_active(layout, d_actives, T=i, S=j)
        chosen = view.active.where(d_active)
        d_active = jax.tree.map(lambda d, x: d.astype(x.dtype), d_active, chosen)
        logits, d_logits = jax.jvp(
            lambda x, chosen: view.logits(x, chosen.fill(view.active)),
            (products, chosen),
            (d_products, d_active),
        )
        # weightsₛ = eₛ, not yet divided by the total; d_logitsₛ = logitₛ′ − mean so far.
        weights, d_logits = exponentials(logits, top[..., None]), d_logits - mean[..., None]
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0)
            d_logits = jnp.where(allowed, d_logits, 0)
        total = total + jnp.sum(weights, axis=-1)
        # step = Σₛ eₛ (logitₛ′ − mean) / total: how far this tile moves the running mean.
        step = jnp.sum(weights * d_logits, axis=-1) / jnp.where(total == 0, 1, total)
        # With the new mean: by_logits = Σₛ eₛ (logitₛ′ − mean − step) vₛ.
        d_weights = weights * (d_logits - step[..., None])
        by_logits = by_logits - step[..., None] * output
        by_logits = by_logits + sums_of(view.drop(d_weights), value, allowed)
        dropped = view.drop(weights)
        output = output + sums_of(dropped, value, allowed)
        if d_value is not None:
            by_values = by_values + sums_of(dropped, d_value, allowed)
        return Sums(total, mean + step, by_logits, by_values, output)

    return body


def _tangent_cell(layout, head, d_head, given, row, column, carry):
    """Adds one cell of a partial tile to the sums of its query block."""

    def tile(cells, given, sums):
        return _tangent_tile(cells, head, d_head, given, row, masked=True)(column, sums)

    return in_cell(layout, row, given, carry, tile)


def _of_products(query, key, d_query, d_key, products):
    """Computes query′ · kₛ + scale · q · kₛ′, where the queries are scaled already."""
    d_products = jnp.zeros_like(products)
    if d_query is not None:
        d_products += dot("BKRH,BKSH->BKRS", d_query, key, products.dtype)
    if d_key is not None:
        d_products += dot("BKRH,BKSH->BKRS", query, d_key, products.dtype)
    return d_products


def _cut_active(layout: Layout, active: Active, **at) -> Active:
    """Cuts the part of aligned arrays at the blocks `at`."""
    cut = lambda x: layout.cut(x, "BKGTS", **at)
    return active._replace(
        bias=jax.tree.map(cut, active.bias), modifier=jax.tree.map(cut, active.modifier)
    )
