"""A tile inside a kernel: its logits, mask and dropout.

The rows of a tile are those that its group of threads computes: queries, or in the
backward pass of keys and values the keys. Its columns are the other side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jattn.dropout import keep
from jattn.implementations.gpu import machine
from jattn.implementations.gpu.layout import form
from jattn.implementations.gpu.pairs import evaluate
from jattn.implementations.joint import Extras


class Tile:
    """Arrays that one tile reads beside its products.

    Args:
        call: The call.
        refs: The extras in global memory.
        own: What the rows of the tile read: the leaves of the extras as vectors, None for
            the others.
        at: The example and the head.
        first: The first row and the first column, counted over the whole inputs.
        shape: The number of rows and of columns.
    """

    def __init__(self, call, refs: Extras, own, at, first, shape):
        self.call, self.pairs, self.shape = call, call.pairs, shape
        position = [machine.count(shape, axis) + first[axis] for axis in (0, 1)]
        self.query, self.key = position if call.by_query else position[::-1]
        leaves, tree = jax.tree.flatten(call.shapes)
        self.where = where = [pl.ds(*x) for x in zip(first, shape, strict=True)]
        read = [
            _read(call, like, ref, value, at, where, shape)
            for like, ref, value in zip(leaves, jax.tree.leaves(refs), own, strict=True)
        ]
        self.read = tree.unflatten(read)

    @property
    def active(self):
        """Gives the arrays in which the logits are differentiated, beside the products."""
        return self.read.modifier, self.read.bias

    @property
    def index(self):
        """Gives the indices of example, head, query and key."""
        b, n, t, s = self.read.index
        if self.call.counts_queries:
            t = self.query
        return b, n, t, self.key if self.pairs.counts_keys else s

    def logits(self, products, active):
        """Computes the logits from scaled products: applies the modifier, then the bias."""
        modifier, bias = active
        logits = products
        if self.pairs.modifier is not None:
            inputs = [products, *self.index, *modifier]
            small = (3, 4) if self.pairs.counts else ()  # t and s
            logits = evaluate(self.pairs.modifier.jaxpr, inputs, self.shape, small)
            logits = logits.astype(products.dtype)
        return logits if bias is None else logits + bias.astype(logits.dtype)

    def allowed(self):
        """Says which pairs count: the mask allows them, and they are not padding."""
        call, sizes, found = self.call, self.call.problem.sizes, []
        if call.has_padding:
            found.append(self.key < sizes.S)
        if call.hides_queries:
            found.append(self.query < sizes.T)
        if self.pairs.mask is not None:
            inputs = [*self.index, *self.read.mask]
            found.append(evaluate(self.pairs.mask.jaxpr, inputs, self.shape))
        return functools.reduce(jnp.logical_and, found) if found else None

    def kept(self):
        """Says which weights dropout keeps; None without dropout."""
        if self.read.words is None:
            return None
        queries, keys = self.read.words
        return keep(queries, keys, self.call.problem.rate)


def own_vectors(call, refs: Extras, at, rows):
    """Reads, once for all tiles, what belongs to their rows."""
    leaves = zip(jax.tree.leaves(call.shapes), jax.tree.leaves(refs), strict=True)
    return [
        machine.vector(ref.at[(*_lead(ref, at), rows)], 0)
        if form(like) == call.own_form
        else None
        for like, ref in leaves
    ]


def _lead(ref, at):
    """Gives the place of the example and the head in an array that may share them."""
    return [0 if size == 1 else i for size, i in zip(ref.shape[:2], at, strict=True)]


def _read(call, like, ref, value, at, where, shape):
    """Reads what a tile needs of one array, and spreads it to the tile."""
    what, lead = form(like), tuple(_lead(ref, at))
    if what == "number":
        value = machine.spread(ref[lead], shape)
    elif what == "tile":
        value = machine.tile(ref.at[(*lead, *where)])
    elif what == call.own_form:
        value = machine.spread(value, shape, 0)
    else:
        value = machine.spread(machine.vector(ref.at[(*lead, where[1])], 1), shape, 1)
    if like.dtype == jnp.bool_:
        return value != 0
    return value.astype(like.dtype)
