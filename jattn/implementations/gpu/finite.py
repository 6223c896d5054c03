"""Numbers that are not finite, kept from the pairs that a mask hides.

A hidden pair has the weight 0. But a product of matrices adds 0 · NaN, which is NaN. So
where there is a mask, the kernels read copies of the inputs:

    forward     A value that is not finite is 0 in its copy, and its key is NaN. A query
                that sees this key has a logit of NaN, and so an output of NaN.
    backward    Every number that is not finite is 0 in the copies. The level of such a
                query is NaN, because its sums of the forward pass are.

One thing differs from the definition. A query that sees a key or a value that is not finite
gets NaN in all features; in some of them the definition may have a number or ∞.
"""

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations import shared


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
    return array if problem.mask is None else shared.isolate(array)[0]


def _rows_are_finite(array):
    return jnp.all(jnp.isfinite(array), axis=-1, keepdims=True)
