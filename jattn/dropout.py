"""Dropout of weights, as a pure function of the seed and of (b, n, t, s).

Each weight is kept with probability 1 − rate and then divided by 1 − rate. Whether a
weight is kept depends only on the seed, the example, the head and the two positions; the
implementation, its blocks and the number of queries in a call change nothing. So the same
weights drop forward and backward, dense and blockwise, on one device and on many.

    word  = query_word[b, n, t] + key_word[b, n, s]     (mod 2³²)
    kept  = mix(word) ≥ rate · 2³²

A query's word is its example, head and position, mixed one after the other into a random
word of the seed. A key's word is made likewise. `mix` is the 32-bit finalizer of
MurmurHash3 (Appleby, 2011): a bijection in which each bit of the input changes each bit of
the output half of the time. So a tile of T × S weights needs only T + S words, and a few
integer operations for each weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import check_flag, known_number
from jattn.pytree import pytree

__all__ = ["Dropout", "Numbered", "keep", "words"]


@pytree("rng", static=("rate", "shared"))
class Dropout:
    """Dropout of weights at `rate`, drawn from the JAX random key `rng`.

    The rate is in [0, 1), and a constant of the compiled program: a number or an array of
    one number, but no traced one. With `shared`, one draw serves all examples and heads:
    the two positions alone decide which weights drop.
    """

    rate: float
    rng: jax.Array
    shared: bool = False

    def __post_init__(self):
        rate = known_number(self.rate)
        if rate is None or not 0 <= rate < 1:
            raise ValueError(
                f"Dropout: `rate` must be a Python number in [0, 1), got {self.rate!r}."
            )
        object.__setattr__(self, "rate", float(rate))
        shared = check_flag("Dropout", "shared", self.shared)
        object.__setattr__(self, "shared", shared)


class Numbered(NamedTuple):
    """A random key, and the numbers of the first example and the first head."""

    rng: jax.Array
    b: int | jax.Array
    n: int | jax.Array


def words(rng, b, n, position, side: int) -> jax.Array:
    """Computes one uint32 for each (b, n, position), integer arrays that broadcast.

    `side` is 0 for queries and 1 for keys.
    """
    if isinstance(rng, Numbered):
        rng, b, n = rng.rng, b + rng.b, n + rng.n
    # Two words of the seed, so that queries and keys at one position have other words. They
    # are drawn twice, once for each side, which `jax.debug_key_reuse` should not report.
    rng = jax.random.clone(rng) if side else rng
    word = jax.random.bits(rng, (2,), jnp.uint32)[side]
    for index in (b, n, position):
        word = _mix(word ^ (index.astype(jnp.uint32) * _GOLDEN + jnp.uint32(1)))
    return word


def keep(query_words, key_words, rate: float) -> jax.Array:
    """Says which weights stay, for words that broadcast to BNTS."""
    least = min(round(rate * 2**32), 2**32 - 1)  # a rate next to 1 rounds to 2³²
    return _mix(query_words + key_words) >= jnp.uint32(least)


_GOLDEN = np.uint32(0x9E3779B9)  # 2³² / golden ratio: maps neighbours far apart


def _mix(x):
    # The shifts and factors are those of MurmurHash3's 32-bit finalizer, `fmix32`.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
