"""−weight · log weight of keys and of the sink, and sums that leave the largest out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jattn.implementations.normalize import of_rows

# The share of a key that is left out of sums. Two equal keys have a half each, which may be
# rounded to more; so it is clearly more than a half.
_MOST = 0.6


class Surprise(NamedTuple):
    """−weight · log weight of a key, and its weight; or sums of both."""

    surprise: jax.Array
    weight: jax.Array


def surprise(log_weights, whole: bool) -> Surprise:
    """Computes −weight · log weight and the weight, 0 for those that are left out."""
    weights = jnp.exp(log_weights)
    # The inner `where` keeps 0 · ∞ out of the derivative, which a `where` outside does not.
    none = weights == 0 if whole else (weights == 0) | (weights > _MOST)
    weights = jnp.where(none, 0, weights)
    return Surprise(-weights * jnp.where(none, 0, log_weights), weights)


def surprise_of_largest(rest):
    """Computes −weight · log weight of the key with more than `_MOST`, 0 if there is none.

    Its weight is 1 − rest, where `rest` is the sum of all other weights, the sink's too:

        −weight · log weight = −(1 − rest) · log(1 − rest)

    The logarithm of a weight near 1 is a small difference of large numbers, but `rest` has
    all its digits. Where no key has so much, the rest is 1, to the last places.
    """
    rest = jnp.where(rest < 0.75, rest, 0)  # it is 1 − _MOST at most, or about 1
    return -(1 - rest) * jnp.log1p(-rest)


def with_sink(sums: Surprise, sink, normalizer, whole: bool) -> Surprise:
    """Adds the sink of each row to its sums, as one more key; None is no sink."""
    if sink is None:
        return sums
    sink = of_rows(sink, normalizer.top)
    log_weights = sink - normalizer.top - normalizer.log_total
    of_sink = surprise(jnp.where(sink == jnp.inf, 0, log_weights), whole)
    return jax.tree.map(jnp.add, sums, of_sink)
