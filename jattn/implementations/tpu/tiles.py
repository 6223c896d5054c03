"""A part of a block inside a kernel: its logits, mask and dropout."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jattn.implementations.joint import Extras, Pairs, kind
from jattn.implementations.tpu.layout import Plan
from jattn.implementations.tpu.pairs import PairTile


class Part(NamedTuple):
    """Some keys and some columns of a block."""

    keys: Any  # a `pl.ds`, whose start may be traced
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Gives the shape, keys × columns."""
        return self.keys.size, self.columns.stop - self.columns.start


def parts(plan: Plan, chunk: int, width: int, half=None) -> list[Part]:
    """Cuts a block, or a half, into parts of `chunk` keys and `width` columns."""
    keys = plan.block_kv if half is None else plan.block_kv // plan.halves
    first: Any = 0 if half is None else half * keys
    found = []
    for at in range(0, keys, chunk):
        start = at if half is None else pl.multiple_of(first + at, math.gcd(keys, chunk))
        some = pl.ds(start, min(chunk, keys - at))
        for left in range(0, plan.columns, width):
            found.append(Part(some, slice(left, min(left + width, plan.columns))))
    return found


class Tile(PairTile):
    """Arrays that one part of a block reads beside its products."""

    def __init__(self, call, pairs: Pairs, refs: Extras, block, part: Part):
        self.call, self.pairs, self.part, self.shape = call, pairs, part, part.shape
        first = block * call.plan.block_kv + part.keys.start
        self.key = first + lax.broadcasted_iota(jnp.int32, (self.shape[0], 1), 0)
        self.read = jax.tree.map(
            lambda ref, like: _read(ref, like, part), refs, call.shapes
        )


def _read(ref, like, part: Part):
    """Reads the part of an array: 1 × columns, keys × 1 or keys × columns."""
    what = kind(like)
    if what == "row":
        value = ref[0, 0, :, part.columns]
    elif what == "column":
        row = ref[0, 0, :, part.keys]
        # A register has 8 rows, so 8 equal rows are transposed and one column is kept.
        value = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
    else:
        value = ref[0, 0, part.keys, part.columns]
    if like.dtype == jnp.bool_:
        return value.astype(jnp.int32) != 0
    return value.astype(like.dtype)
