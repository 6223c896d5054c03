"""A part of a block inside the kernel: its logits, mask and dropout, rows by slots."""

import jax
import jax.numpy as jnp
from jax import lax

from jattn.implementations.joint import Extras
from jattn.implementations.tpu.decode.rows import kind
from jattn.implementations.tpu.decode.slots import Part
from jattn.implementations.tpu.pairs import PairTile


class Tile(PairTile):
    """Arrays that one part of a block reads beside its products."""

    def __init__(self, call, refs: Extras, block, part: Part):
        self.call, self.pairs = call, call.pairs
        self.shape = call.rows, part.size
        first = block * call.cut.size + part.first
        self.key = first + lax.broadcasted_iota(jnp.int32, (1, part.size), 1)
        self.read = jax.tree.map(
            lambda ref, like: _read(ref, like, part), refs, call.shapes
        )


def _read(ref, like, part: Part):
    """Reads the part of an array: rows × 1, 1 × slots or rows × slots."""
    slots = slice(part.first, part.first + part.size)
    value = ref[0, 0] if kind(like) == "row" else ref[0, 0, :, slots]
    if like.dtype == jnp.bool_:
        return value.astype(jnp.int32) != 0
    return value.astype(like.dtype)
