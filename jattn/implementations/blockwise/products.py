"""Products of queries and keys, and sums of values, of one tile."""

import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import is_one, wide_dtype
from jattn.implementations import shared
from jattn.operations.mapped import cond_any


def dot(spec: str, x, y, wide):
    """Computes a product whose sums are in the wide precision."""
    return jnp.einsum(spec, x, y, preferred_element_type=wide)


# XLA:CPU sums up the products of a pair in an order that follows from the last axis of the
# result: with AVX2 one order for all multiples of 16, with AVX-512 one each for multiples
# of 64, of 32 and of 16 (Zen 5, jax 0.10.2, 16 to 1024 rows and keys).
LANES = 64
FEW = 16  # with fewer rows, to pad the keys would take longer than the product


def products_of(layout, query, key):
    """Multiplies each query by each key, BKRH and BKSH to BKRS."""
    wide = layout.problem.wide
    key = key if layout.narrow_logits else key.astype(wide)
    products = rows_of(query, key, wide)
    if not layout.narrow_logits:
        return products
    # Else XLA computes the maximum of rounded logits, and the weights of others.
    return shared.rounded(products * layout.operands.scale)


def rows_of(query, key, wide):
    """Multiplies each query by each key, summing up as in the forward pass.

    So do tangents: a logit's tangent and its mean in a row, which come from two passes,
    differ by no rounding where one key has all the weight.
    """
    count = key.shape[2]
    if not _are_few(query):  # padding would copy all keys for the sake of a few queries
        key = _whole_lanes(key)
    products = _each("BKRH,BKSH->BKRS", query, key, wide)
    return lax.slice_in_dim(products, 0, count, axis=3)


def _each(spec: str, x, y, wide):
    """Multiplies each query by each key, over the axis H of both."""
    products = dot(spec, x, y, wide)
    # For H = 1 this is a multiplication, and XLA fuses it with what comes after it.
    return shared.rounded(products) if is_one(x.shape[3]) else products


def columns_of(query, key, wide):
    """Computes the result of `products_of`, equal in every bit, with axes BKSR.

    So backward computes exactly the logits of the forward pass. Otherwise large logits
    would differ too much: the last place of 1e8 is 8.
    """
    if _are_few(query) or _are_few(key):
        # Without the barrier XLA merges the product and the swap into another product,
        # which sums in another order.
        rows = lax.optimization_barrier(rows_of(query, key, wide))
        return jnp.swapaxes(rows, 2, 3)
    products = _each("BKSH,BKRH->BKSR", key, _whole_lanes(query), wide)
    return lax.slice_in_dim(products, 0, query.shape[2], axis=3)


def _are_few(rows) -> bool:
    return isinstance(rows.shape[2], int) and rows.shape[2] < FEW


def _whole_lanes(rows):
    """Pads rows BKRH by zeros to a multiple of LANES, if their number is known."""
    count = rows.shape[2]
    if not isinstance(count, int) or count % LANES == 0:
        return rows
    return jnp.pad(rows, [(0, 0), (0, 0), (0, -count % LANES), (0, 0)])


def sums_of(weights, value, allowed, unasked: bool = False):
    """Sums up the values BKSD, times weights BKRS.

    With a mask, a non-finite number in a value counts as 0 in the sum, because 0 · NaN is
    NaN. After the sum, each row that sees such a value gets ±∞ or NaN in its feature. With
    `unasked` it gets NaN in all features, without a condition on whether there is such a
    value, for which a GPU would make the host wait.
    """
    wide = wide_dtype(weights.dtype)
    if allowed is None:
        return dot("BKRS,BKSD->BKRD", weights, value, wide)
    finite, poison = shared.isolate(value)
    poison = poison.astype(wide)
    total = dot("BKRS,BKSD->BKRD", weights, finite, wide)
    if unasked:
        seen = jnp.where(allowed, poison[..., None, :], 0)
        return total + jnp.sum(seen, axis=-1)[..., None]

    def spoil(total):
        return total + shared.spoiled(weights.astype(wide), value, allowed)

    return cond_any(jnp.any(jnp.isnan(poison)), spoil, lambda total: total, total)
