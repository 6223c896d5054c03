"""Attention a few whole rows at a time, in plain operations that JAX differentiates."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem
from jattn.implementations import shared
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import rows_plan
from jattn.implementations.blockwise.products import products_of, sums_of
from jattn.implementations.blockwise.tiles import Tile


def by_rows(problem: Problem, operands: Operands):
    """Computes output, maximum and sum, whole rows at a time.

        topₜ = maxₛ logitₜₛ        totalₜ = Σₛ exp(logitₜₛ − topₜ)
        outputₜ = Σₛ (exp(logitₜₛ − topₜ) / totalₜ) vₛ

    The operations are plain, and JAX differentiates them to any order.
    """
    sizes, wide = problem.sizes, problem.wide
    layout = Layout(problem, operands, rows_plan(problem))
    key, value = (jnp.moveaxis(x.astype(wide), 2, 1) for x in (layout.key, layout.value))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rows(i):
        view = Tile(layout, layout.aligned, i, 0)
        logits, allowed = row_logits(layout, view, key, i)
        top = lax.stop_gradient(jnp.max(logits, axis=-1))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(logits - top[..., None])
        total = jnp.sum(weights, axis=-1)
        # Divided before the sum, so that no sum cancels another one in a derivative.
        # Not by maximum(total, 1) as in `forward.finish`: that halves the derivative
        # where a row sees one key, as total is 1 there.
        weights = weights / jnp.where(total == 0, 1, total)[..., None]
        # Dropout scales the sum. To scale each weight would be a product in its derivative,
        # which XLA:CPU fuses with the difference after it: where one key has all the weight
        # the difference is 0, and would be the rounding of the product.
        kept = sums_of(view.kept(weights), value, allowed)
        return kept / (1 - problem.rate), top, total

    results = lax.map(rows, jnp.arange(layout.counts["T"]))
    whole = (jnp.zeros((*layout.query.shape[:3], sizes.D), wide),)
    whole = (*whole, *[jnp.zeros(layout.query.shape[:3], wide)] * 2)
    return tuple(
        layout.unqueries(layout.put_row_blocks(x, y))
        for x, y in zip(whole, results, strict=True)
    )


def row_logits(layout: Layout, view: Tile, key, i):
    """Computes the logits of whole rows by all keys BKSH, and says which pairs count."""
    query, allowed = layout.scaled(layout.rows(layout.query, T=i)), view.allowed()
    if allowed is None:
        return view.logits(products_of(layout, query, key), view.active), None
    query, query_poison = shared.isolate(query)  # the transposed product mixes rows
    key, key_poison = shared.isolate(key)
    poison = query_poison[..., None] + key_poison[..., None, :]
    products = products_of(layout, query, key)
    if layout.problem.modifier is not None:
        products = shared.harmless(products, allowed)
    logits = view.logits(products, view.active)
    return jnp.where(allowed, logits + poison, -jnp.inf), allowed
