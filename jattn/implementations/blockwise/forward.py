"""Output, maximum and sum, tile by tile, as running values of each row.

    top = maxₛ logitₛ        total = Σₛ exp(logitₛ − top)        output = Σₛ eₛ vₛ / total

where eₛ = exp(logitₛ − top). When a tile raises the maximum from top to top′, the sums so
far are multiplied by exp(top − top′).

The maximum and the total stay separate. Their combination top + log total has a rounding
error as large as that of top, and this error would change every weight computed from it.

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 1; Milakov and Gimelshein, 2018,
    arXiv:1805.02867, the running sum.
"""

import functools

import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import wide_dtype
from jattn.implementations import shared
from jattn.implementations.blockwise.common import common
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.products import dot, products_of, sums_of
from jattn.implementations.blockwise.rows import row_sums
from jattn.implementations.blockwise.tiles import Tile
from jattn.operations.mapped import cond_any


def forward(layout: Layout):
    """Computes the output BTND in the wide precision; the maximum and the sum BTN."""
    if not layout.plan.folded:
        return _forward(layout)
    # A folded product computes all heads together and separates them by zeros. That works
    # while everything is finite; if a NaN appears, heads are computed separately.
    folded = _forward(layout)
    spoiled = functools.reduce(jnp.logical_or, (jnp.any(jnp.isnan(x)) for x in folded))
    plan = layout.plan._replace(folded=False)
    apart = Layout(layout.problem, layout.operands, plan, wide=not layout.narrow)
    return cond_any(spoiled, lambda: _forward(apart), lambda: folded)


def _forward(layout: Layout):
    def of_head(head):
        head = head._replace(centre=_centre(layout, head))

        def block(i):
            query = layout.scaled(layout.rows(layout.query, T=i, **head.at))
            return functools.partial(_forward_tile, head), query

        return block

    wide, rows = layout.problem.wide, layout.rows_of_block
    zeros = jnp.zeros(rows, wide), jnp.zeros((*rows, layout.problem.sizes.D), wide)
    lowest = jnp.full(rows, jnp.finfo(wide).min)
    return row_sums(
        layout,
        of_head,
        (lowest, *zeros),
        lambda sums: finish(*sums),
        bare=True,
        folded=layout.plan.folded,
    )


def _forward_tile(head, layout, query, i, masked):
    """Makes the body of the loop over the tiles of one query block.

    The carry is the running maximum, sum and output; it is None where there is only one
    tile.
    """
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
        # The maximum of a masked row is the lowest finite number, so that −∞ − top is −∞
        # and not NaN. A `where` would do the same, but would stop XLA from fusing
        # products, maximum and exponential into one loop.
        row_max = jnp.max(logits, axis=-1, initial=jnp.finfo(logits.dtype).min)
        if carry is not None:
            row_max = jnp.maximum(row_max, carry[0])
        row_max = lax.stop_gradient(row_max)
        weights = jnp.exp(logits - row_max[..., None])
        row_sum = jnp.sum(weights, axis=-1)
        sums = _sums(layout, head, view.drop(weights), value, allowed)
        if carry is not None:
            shrink = jnp.exp(carry[0] - row_max)
            row_sum = carry[1] * shrink + row_sum
            sums = carry[2] * shrink[..., None] + sums
        return row_max, row_sum, sums

    return body


def _sums(layout: Layout, head, weights, value, allowed):
    """Sums up values, and adds what weights lose where they are rounded, times c.

        Σₛ weightₛ vₛ ≈ Σₛ roundedₛ vₛ + Σₛ (weightₛ − roundedₛ) c

    Else the error would have in it what all values have in common, c, and backward
    subtracts outputs from single values. A GPU would launch some kernels more.
    """
    rounded = layout.narrowed(weights)
    if head.centre is not None:
        # Else XLA may leave out the rounding in one use of it and not in the other.
        rounded = lax.optimization_barrier(rounded)
    sums = (
        _folded_sums(rounded, value)
        if layout.plan.folded
        else sums_of(rounded, value, allowed, layout.plan.flat)
    )
    if head.centre is None:
        return sums
    lost = jnp.sum(weights - rounded.astype(weights.dtype), axis=-1)
    return sums + lost[..., None] * head.centre


def _centre(layout: Layout, head):
    """Gives c of each head, BK1D, if it is to be added: what its values have in common."""
    if not layout.narrow or layout.plan.flat:
        return None
    if layout.plan.folded:  # whose values are BSKD
        return jnp.moveaxis(common(head.value, 1, layout.problem.wide), 1, 2)
    return common(head.value, 2, layout.problem.wide)


def _folded_products(layout, query, key):
    """Multiplies queries BKRH by keys BSKH as one product, without moving the keys.

    Each query gets zeros for the heads that are not its own. This takes K times the
    arithmetic, which costs less than to copy the keys of each head together.
    """
    B, K, R, H = query.shape
    own = jnp.eye(K, dtype=bool)[None, :, None, :, None]
    query = jnp.where(own, query[:, :, :, None], 0).reshape(B, K * R, K * H)
    key = layout.narrowed(key).reshape(*key.shape[:2], K * H)
    products = dot("BSX,BYX->BSY", key, query, layout.problem.wide)
    products = jnp.swapaxes(products, 1, 2).reshape(B, K, R, -1)
    # Rounded, or XLA computes the maximum of other logits than the weights.
    return shared.rounded(products * layout.operands.scale) if layout.narrow else products


def _folded_sums(weights, value):
    """Sums up values BSKD, times weights BKRS, for all heads as one product.

    The product pairs each head with each head; the einsum at the end keeps the pairs of
    equal heads.
    """
    B, K, R, S = weights.shape
    wide = wide_dtype(weights.dtype)
    value = value.reshape(B, S, -1)
    weights = jnp.swapaxes(weights.reshape(B, K * R, S), 1, 2)
    sums = dot("BSY,BSX->BYX", weights, value, wide)
    return jnp.einsum("BKRKD->BKRD", sums.reshape(B, K, R, K, -1))


def finish(row_max, row_sum, output):
    """Computes output, maximum and sum of rows after all tiles; 0 where a row saw none."""
    # The largest weight of a row that sees something is 1, so its sum is at least that.
    divisor = jnp.maximum(row_sum, 1)
    return output / divisor[..., None], jnp.where(row_sum == 0, 0, row_max), row_sum
