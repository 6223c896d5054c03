"""The smooth cap of a logit, whose derivatives keep their digits at every size.

JAX's own derivative of tanh is 1 − tanh², which is 0 where tanh rounds to 1.
"""

from typing import Any

import jax
import jax.numpy as jnp

# From here on tanh is ±1 and its slope 0, in float64 too: e⁻⁸⁰⁰ is below its least number.
_FAR = 400.0


@jax.custom_jvp
def _capped(logit, cap, inverse):
    """Computes cap · tanh(logit / cap); `inverse` is 1 / cap.

    With u = logit / cap, the derivatives are

        by the logit    sech² u
        by the cap      tanh u − u sech² u

    That by `inverse` is part of the second one.
    """
    return cap * tanh(logit * inverse)


def _tangent(primals, tangents) -> Any:
    logit, _, inverse = primals
    d_logit, d_cap, _ = tangents
    u = logit * inverse
    return capped(*primals), sech2(u) * d_logit + _by_cap(u) * d_cap


@jax.custom_jvp
def _tanh(u):
    return jnp.tanh(u)


@jax.custom_jvp
def _sech2(u):
    """Computes sech² u = 4 p / (1 + p)², with p = exp(−2 |u|).

    As 2 / (1 + p) = 1 + tanh |u|, and tanh is at hand, no division is needed.
    """
    both = 1 + jnp.abs(jnp.tanh(u))
    return jnp.exp(-2 * jnp.abs(u)) * (both * both)


def _by_cap(u):
    """Computes tanh u − u sech² u, which is (sinh 2u − 2u) / 2 · sech² u.

    From |u| = 1 on the first form loses no digits. Below, the second one takes

        sinh v − v = v³ / 6 · (1 + v² / (4 · 5) · (1 + v² / (6 · 7) · (1 + …)))

    whose eleventh term is 2e-16 of the sum at v = 2.
    """
    near = jnp.abs(u) < 1
    small, large = jnp.where(near, u, 0), jnp.clip(u, -_FAR, _FAR)
    square, series = 4 * small * small, jnp.ones_like(u)
    for k in range(11, 1, -1):
        series = 1 + square / (2 * k * (2 * k + 1)) * series
    by_series = 2 / 3 * small * small * small * series * sech2(small)
    return jnp.where(near, by_series, tanh(large) - large * sech2(large))


_capped.defjvp(_tangent)
_tanh.defjvps(lambda d, _, u: sech2(u) * d)
_sech2.defjvps(lambda d, slope, u: -2 * tanh(u) * slope * d)
# Jitted, so that a call outside of `jit` neither traces them nor makes their keys again.
capped, tanh, sech2 = map(jax.jit, (_capped, _tanh, _sech2))
