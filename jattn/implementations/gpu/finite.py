"""Numbers that are not finite, kept from the pairs that a mask hides.

A product of matrices adds 0 · NaN = NaN for a pair of weight 0. So where there is a mask,
the kernels read finite numbers, and NaN reaches the logits of those who see one that was
not finite:

    forward     a value becomes 0, and its key NaN
    backward    all become 0; who sees one of them has the level NaN, from its sums

Both follow the definition but for one thing: who sees a key or a value that is not finite
has NaN in all features, also in those where the definition has a number or ∞.
"""

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem


def of_forward(problem: Problem, operands: Operands) -> Operands:
    """Replaces keys and values that are not finite."""
    if problem.mask is None:
        return operands
    key, value = operands.key, operands.value
    if key.shape == value.shape:  # one pass for both: no row has to be looked at first
        seen = jnp.isfinite(key) & jnp.isfinite(value)
    else:
        seen = _rows_are_finite(key) & _rows_are_finite(value)
    key, value = jnp.where(seen, key, jnp.nan), jnp.where(seen, value, 0)
    return operands._replace(key=key, value=value)


def of_backward(problem: Problem, operands: Operands) -> Operands:
    """Replaces numbers of queries, keys and values that are not finite."""
    return operands._replace(
        query=cleaned(problem, operands.query),
        key=cleaned(problem, operands.key),
        value=cleaned(problem, operands.value),
    )


def cleaned(problem: Problem, array) -> jax.Array:
    """Replaces numbers that are not finite by 0, where there is a mask."""
    return array if problem.mask is None else jnp.where(jnp.isfinite(array), array, 0)


def _rows_are_finite(array):
    return jnp.all(jnp.isfinite(array), axis=-1, keepdims=True)
