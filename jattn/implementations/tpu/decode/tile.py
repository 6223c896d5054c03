"""A part of a block inside the kernel: its logits, mask and dropout, rows by slots."""

import jax
import jax.numpy as jnp
from jax import lax

from jattn.dropout import keep
from jattn.implementations.joint import Extras
from jattn.implementations.shared import rounded
from jattn.implementations.tpu.decode.rows import kind
from jattn.implementations.tpu.decode.slots import Part
from jattn.implementations.tpu.pairs import evaluate, spread


class Tile:
    """Arrays that one part of a block reads beside its products."""

    def __init__(self, call, refs: Extras, block, part: Part):
        self.call, self.pairs = call, call.pairs
        self.shape = call.rows, part.size
        first = block * call.cut.size + part.first
        self.slot = first + lax.broadcasted_iota(jnp.int32, (1, part.size), 1)
        self.read = jax.tree.map(
            lambda ref, like: _read(ref, like, part), refs, call.shapes
        )

    def logits(self, products):
        """Computes the logits from scaled products: applies the modifier, then the bias."""
        logits = products
        if self.pairs.modifier is not None:
            inputs = [products, *self._index, *self.read.modifier]
            small = (3, 4) if self.pairs.counts else ()  # t and s
            logits = evaluate(self.pairs.modifier.jaxpr, inputs, small)
            logits = spread(logits.astype(products.dtype), self.shape)
            logits = rounded(logits) if self.call.interpret else logits
        return logits if self.read.bias is None else logits + self.read.bias

    def allowed(self, has_padding: bool):
        """Says which pairs count: the mask allows them, and the slot is there."""
        allowed = None
        if self.pairs.mask is not None:
            allowed = evaluate(self.pairs.mask.jaxpr, [*self._index, *self.read.mask])
            allowed = spread(allowed, self.shape)
        if has_padding:
            inside = spread(self.inside, self.shape)
            allowed = inside if allowed is None else allowed & inside
        return allowed

    def kept(self):
        """Says which weights dropout keeps; None without dropout."""
        if self.read.words is None:
            return None
        queries, keys = (spread(x, self.shape) for x in self.read.words)
        return keep(queries, keys, self.call.problem.rate)

    @property
    def inside(self):
        """Says which slots are there, 1 × slots."""
        return self.slot < self.call.cut.slots

    @property
    def _index(self):
        at = self.read.index
        return (*at[:3], self.slot) if self.pairs.counts_keys else at


def _read(ref, like, part: Part):
    """Reads the part of an array: rows × 1, 1 × slots or rows × slots."""
    slots = slice(part.first, part.first + part.size)
    value = ref[0, 0] if kind(like) == "row" else ref[0, 0, :, slots]
    if like.dtype == jnp.bool_:
        return value.astype(jnp.int32) != 0
    return value.astype(like.dtype)
