"""The logits of a tile, some queries by some keys, shared by every implementation.

A NaN or Inf in a key that a query does not see must not reach it, forward or backward,
though a matrix product mixes every query with every key and 0 · NaN is NaN. So where
there is a mask, products are taken of finite arrays, and what was not finite comes back
as `poison`, added to the logits before the mask: whoever sees it gets NaN.
"""

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.call.program import Index

# Inside the domain of √x, log x, log(1 − x), asin x, atanh x and 1 / x, and no pole.
HARMLESS = 0.618


def allowed(problem: Problem, operands: Operands, index: Index) -> jax.Array | None:
    """Which pairs count, four axes that broadcast to BNTS; None where all do."""
    if problem.mask is None:
        return None
    return problem.mask(operands.mask, index)


def harmless(products: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """The products, with a number that suits most modifiers where pairs do not count.

    The derivative of a modifier may be infinite for the logit of a masked pair, as that
    of √logit is at 0, and 0 · ∞ is NaN: so it is taken at another logit there.
    """
    return products if allowed is None else jnp.where(allowed, products, HARMLESS)


def rounded(logits: jax.Array) -> jax.Array:
    """The logits of a modifier as numbers that are rounded wherever they are used.

    Compilers join a multiplication and what is subtracted after it into one operation
    that rounds once. So logit − top would differ from 0 at the maximum itself, by 4 for
    a logit of 1e8. They do not look through a choice. An infinite logit is NaN in the end.
    """
    return jnp.where(logits < jnp.inf, logits, jnp.nan)


def isolate(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The array with 0 for what is not finite, and NaN for each row that had some."""
    finite = jnp.isfinite(array)
    poison = jnp.where(jnp.all(finite, axis=-1), 0, jnp.nan).astype(array.dtype)
    return jnp.where(finite, array, 0), poison


def products(query: jax.Array, key: jax.Array) -> jax.Array:
    """Each query by each key, BTNH and BSKH to BNTS, in the precision of both.

    The queries of the G heads that share a key head are the rows of one product.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    rows = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3).reshape(
        B, K, N // K * T, H
    )
    return jnp.einsum("BKRH,BSKH->BKRS", rows, key).reshape(B, N, T, S)


def sums(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The values in proportion to weights, BNTS and BSKD to BTND."""
    B, N, T, S = weights.shape
    K, D = value.shape[2:]
    rows = weights.reshape(B, K, N // K * T, S)
    output = jnp.einsum("BKRS,BSKD->BKRD", rows, value).reshape(B, K, N // K, T, D)
    return jnp.moveaxis(output, 3, 1).reshape(B, T, N, D)


def logits(problem: Problem, operands: Operands, index: Index, products) -> jax.Array:
    """Modifier, then bias, on products that were scaled."""
    if problem.modifier is not None:
        modified = problem.modifier(operands.modifier, index, products)
        products = rounded(modified.astype(products.dtype))
    if operands.bias is not None:
        products = products + operands.bias
    return products


def row_factors(total):
    """What turns exponentials of a row into weights, and which of these are settled.

    The first is 1 / total, and 0 where a row sees nothing. An exponential above the
    second has all the weight, to the last place: there the softmax is constant. The
    difference of v · d_output and δ, which are rounded apart, would not be 0 there.
    """
    inverse = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
    return inverse, jnp.where(total == 1, jnp.array(0.5, total.dtype), 2)


def row_numbers(outputs, cotangents):
    """What backward needs of each row: top, the factors, δ, and δ less d_logsumexp."""
    output, top, total = outputs
    d_output, _, d_total = cotangents
    inverse, settled = row_factors(total)
    delta = jnp.sum(d_output * output, axis=-1)
    return top, inverse, settled, delta, delta - d_total * total


def sum_all(array):
    """The sum of all numbers, axis by axis: fewer roundings than one after the other."""
    while array.ndim:
        array = jnp.sum(array, axis=-1)
    return array
