"""Buckets of distances: which column of a table a pair of positions reads."""

import dataclasses
import functools

import jax.numpy as jnp

from jattn.arrays.checks import check_flag
from jattn.arrays.integers import known_whole


@dataclasses.dataclass(frozen=True)
class LogBucket:
    """Function from s − t to T5's bucket; `log_bucket` makes one."""

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def __post_init__(self):
        if self.exact < 1 or self.max_distance <= self.exact:
            least = 4 if self.bidirectional else 2
            raise ValueError(
                f"modifiers.log_bucket: needs num_buckets ≥ {least} and max_distance > "
                f"{max(self.exact, 1)}, got {self.num_buckets} and {self.max_distance}."
            )

    @property
    def count(self) -> int:
        """Gives the number of buckets on one side of s = t."""
        return self.num_buckets // (2 if self.bidirectional else 1)

    @property
    def exact(self) -> int:
        """Gives how many buckets of one side, the near ones, hold one distance each."""
        return self.count // 2

    def __call__(self, offset):
        """Gives the bucket of s − t, an integer."""
        both, exact, count = self.bidirectional, self.exact, self.count
        far = jnp.abs(offset) if both else jnp.maximum(-offset, 0)
        # bucket = exact + ⌊log(far / exact) / log(max_distance / exact) · (count − exact)⌋
        # for far ≥ exact. Nearer distances take `far` itself. A quotient of logarithms may
        # be rounded to less than a whole number, so distances are compared instead.
        index = jnp.minimum(far, exact)
        for first in _firsts(exact, count, self.max_distance):
            index += (far >= first).astype(jnp.int32)
        # Later keys have the second half of the buckets.
        return index + jnp.where(offset > 0, count, 0) if both else index

    def __repr__(self) -> str:
        return f"log_bucket({self.num_buckets}, {self.max_distance}, {self.bidirectional})"


def log_bucket(num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
    """Makes T5's buckets, s − t → index: exact for near keys, logarithmic for far keys.

    Two functions made with the same arguments are equal, and make one program.

    Reference:
        Raffel et al., 2020, arXiv:1910.10683, section 2.1.
    """
    where = "modifiers.log_bucket"
    num_buckets = known_whole(where, "num_buckets", num_buckets, 1)
    # Positions are int32, and so are the distances that begin a bucket.
    max_distance = known_whole(where, "max_distance", max_distance, 1, most=2**31 - 1)
    both = check_flag(where, "bidirectional", bidirectional)
    return LogBucket(num_buckets, max_distance, both)


@functools.cache
def _firsts(exact: int, count: int, max_distance: int) -> list[int]:
    """Computes the first distance of each bucket after the first logarithmic one.

    In whole numbers, with steps = count − exact, it is the least `far` where

        far / exact ≥ (max_distance / exact)^(k / steps)
        far^steps ≥ max_distance^k · exact^(steps − k)
    """
    steps, firsts = count - exact, []
    for k in range(1, steps):
        power = max_distance**k * exact ** (steps - k)
        near = round(exact * (max_distance / exact) ** (k / steps))
        firsts.append(next(x for x in range(near - 1, near + 2) if x**steps >= power))
    return firsts


@dataclasses.dataclass(frozen=True)
class ClippedBucket:
    """Function that gives each s − t up to ±radius its bucket; `distance` makes one."""

    radius: int

    def __call__(self, offset):
        """Gives the bucket of s − t, an integer."""
        return jnp.clip(offset, -self.radius, self.radius) + self.radius

    def __repr__(self) -> str:
        return f"distance({self.radius})"


def distance(radius: int):
    """Makes a bucket for each s − t up to ±radius; farther pairs join the last bucket."""
    # The last bucket is the one with the number 2 · radius, which int32 must hold.
    radius = known_whole("modifiers.distance", "radius", radius, 0, most=2**30 - 1)
    return ClippedBucket(radius)
