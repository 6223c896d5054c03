"""Output, maximum and sum, tile by tile: the running ones of each row.

The maximum of a row's logits and the sum of their exponentials stay apart:

    top = maxₛ logitₛ        total = Σₛ exp(logitₛ − top)

for top + log total, rounded as a number of the size of top, would move every weight that
is computed from it by that rounding.

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 1; Milakov and Gimelshein, 2018,
    arXiv:1805.02867, the running sum.
"""

import functools

import jax.numpy as jnp
from jax import lax

from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.tiles import (
    Tile,
    dot,
    loop,
    over_heads,
    over_tiles,
    products_of,
    sums_of,
)
from jattn.operations.mapped import cond_any
from jattn.shapes import is_one, wide_dtype


def forward(layout: Layout):
    """The output BTND in the wide precision; the maximum and the sum BTN."""
    if not layout.plan.folded:
        return _forward(layout)
    # Folded heads mix in products with zeros, which keep them apart while all is finite.
    folded = _forward(layout)
    spoiled = functools.reduce(jnp.logical_or, (jnp.any(jnp.isnan(x)) for x in folded))
    plan = layout.plan._replace(folded=False)
    apart = Layout(layout.problem, layout.operands, plan, wide=not layout.narrow)
    return cond_any(spoiled, lambda: _forward(apart), lambda: folded)


def _forward(layout: Layout):
    sizes, wide = layout.problem.sizes, layout.problem.wide
    folded, scale = layout.plan.folded, layout.operands.scale
    by_query, _ = schedules(layout)
    shape = layout.query.shape[:3]
    output = jnp.zeros((*shape, sizes.D), wide)

    def one_head(head, carry):
        def one_block(i, carry):
            query = layout.rows(layout.query, T=i, **head.at)
            # In float32, so that scaling before the product costs nothing and is exact.
            query = layout.scaled(query) if folded else query.astype(wide) * scale
            body = functools.partial(_forward_tile, layout, head, query, i)
            start = None
            if not is_one(layout.counts["S"]):
                rows = query.shape[:3]
                start = (
                    jnp.full(rows, jnp.finfo(wide).min),
                    jnp.zeros(rows, wide),
                    jnp.zeros((*rows, sizes.D), wide),
                )
            state = over_tiles(by_query, head, i, layout.counts["S"], body, start)
            return tuple(
                layout.put_rows(whole, part, T=i, **head.at)
                for whole, part in zip(carry, finish(*state), strict=True)
            )

        return loop(layout.counts["T"], one_block, carry)

    start = (output, jnp.zeros(shape, wide), jnp.zeros(shape, wide))
    results = over_heads(layout, one_head, start, folded)
    return tuple(map(layout.unqueries, results))


def _forward_tile(layout, head, query, i, masked):
    """The body of the loop over the tiles of one query block; carries None at first."""
    folded = layout.plan.folded
    if masked:
        layout = layout.ragged()

    def body(j, carry):
        view = Tile(layout, head.aligned, i, j)
        axes = "BSK." if folded else "BKS."
        key = layout.cut(head.key, axes, S=j)
        value = layout.narrowed(layout.cut(head.value, axes, S=j))
        products = (_folded_products if folded else products_of)(layout, query, key)
        logits = view.logits(products, view.active)
        allowed = view.allowed() if masked else None
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        # At least the least number, so that −∞ − top is −∞. A `where` would do as well,
        # but would keep XLA from making one loop of products, maximum and exponential.
        row_max = jnp.max(logits, axis=-1, initial=jnp.finfo(logits.dtype).min)
        if carry is not None:
            row_max = jnp.maximum(row_max, carry[0])
        row_max = lax.stop_gradient(row_max)
        weights = jnp.exp(logits - row_max[..., None])
        row_sum = jnp.sum(weights, axis=-1)
        weights = layout.narrowed(view.drop(weights))
        sums = _folded_sums(weights, value) if folded else sums_of(weights, value, allowed)
        if carry is not None:
            shrink = jnp.exp(carry[0] - row_max)
            row_sum = carry[1] * shrink + row_sum
            sums = carry[2] * shrink[..., None] + sums
        return row_max, row_sum, sums

    return body


def _folded_products(layout, query, key):
    """Queries BKRH by keys BSKH as one product, which reads the keys where they lie.

    Each query has zeros for the heads that are not its own: K times the arithmetic, which
    is little beside moving the keys of each head together.
    """
    B, K, R, H = query.shape
    own = jnp.eye(K, dtype=bool)[None, :, None, :, None]
    query = jnp.where(own, query[:, :, :, None], 0).reshape(B, K * R, K * H)
    key = layout.narrowed(key).reshape(*key.shape[:2], K * H)
    products = dot("BSX,BYX->BSY", key, query, layout.problem.wide)
    products = jnp.swapaxes(products, 1, 2).reshape(B, K, R, -1)
    return products * layout.operands.scale if layout.narrow else products


def _folded_sums(weights, value):
    """Values BSKD in proportion to weights BKRS, all heads as one product."""
    B, K, R, S = weights.shape
    wide = wide_dtype(weights.dtype)
    value = value.reshape(B, S, -1)
    weights = jnp.swapaxes(weights.reshape(B, K * R, S), 1, 2)
    sums = dot("BSY,BSX->BYX", weights, value, wide)
    return jnp.einsum("BKRKD->BKRD", sums.reshape(B, K, R, K, -1))


def finish(row_max, row_sum, output):
    """Output, maximum and sum of rows that saw all their tiles; 0 where they saw none."""
    # The largest weight of a row that sees something is 1, so its sum is at least that.
    divisor = jnp.maximum(row_sum, 1)
    return output / divisor[..., None], jnp.where(row_sum == 0, 0, row_max), row_sum
