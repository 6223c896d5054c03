"""The smooth cap of a logit, whose derivatives keep their digits at every size."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# From here on tanh is ±1 and its slope 0, in float64 too: e⁻⁸⁰⁰ is below its least number.
_FAR = 400.0


@jax.custom_jvp
def capped(logit, cap, inverse):
    """Computes cap · tanh(logit / cap); `inverse` is 1 / cap.

    With u = logit / cap, the derivatives are

        by the logit    sech² u
        by the cap      tanh u − u sech² u

    JAX's own have 1 − tanh² u for sech² u, which is 0 where tanh u rounds to 1; and the
    second one is a difference of two numbers that are equal to many digits where u is
    small. The derivative by `inverse` is part of that by the cap.
    """
    return cap * jnp.tanh(logit * inverse)


def _tangent(primals, tangents):
    logit, cap, inverse = primals
    d_logit, d_cap, _ = tangents
    ratio = logit * inverse
    terms = []
    # A constant has no tangent, and then nothing is computed for it.
    if type(d_logit) is not SymbolicZero:
        terms.append(_by_logit(ratio) * d_logit)
    if type(d_cap) is not SymbolicZero:
        terms.append(_by_cap(ratio) * d_cap)
    tangent = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(logit)
    return cap * jnp.tanh(ratio), tangent


capped.defjvp(_tangent, symbolic_zeros=True)


@jax.jit
def _by_logit(ratio):
    """Computes sech² u = 4 e / (1 + e)², where e = exp(−2 |u|) cannot overflow."""
    power = jnp.exp(-2 * jnp.abs(ratio))
    inverse = 1 / (1 + power)
    return 4 * power * inverse * inverse


@jax.jit
def _by_cap(ratio):
    """Computes tanh u − u sech² u, which is (sinh 2u − 2u) / 2 · sech² u.

    From |u| = 1 on the first form loses no digits. Below, the second one takes

        sinh v − v = v³ / 6 · (1 + v² / (4 · 5) · (1 + v² / (6 · 7) · (1 + …)))

    whose eleventh term is 2e-16 of the sum at v = 2.
    """
    near = jnp.abs(ratio) < 1
    small, large = jnp.where(near, ratio, 0), jnp.clip(ratio, -_FAR, _FAR)
    square, series = 4 * small * small, jnp.ones_like(ratio)
    for k in range(11, 1, -1):
        series = 1 + square / (2 * k * (2 * k + 1)) * series
    power = jnp.exp(-2 * jnp.abs(large))
    tanh = jnp.sign(large) * (1 - power) / (1 + power)
    by_series = 2 / 3 * small * small * small * series * _by_logit(small)
    return jnp.where(near, by_series, tanh - large * _by_logit(large))
