"""The rows and columns that one-sided facts select."""

import functools
import itertools
import operator
from typing import Any

import numpy as np

from jattn.blocks.bounds import (
    TRUE,
    Layout,
)
from jattn.blocks.graph import KEY, QUERY, Node, size
from jattn.blocks.intervals import (
    Interval,
    apply,
    both,
    extremes,
    namespace,
    point,
    typed,
    unknown,
)
from jattn.blocks.ranges import range_extremes

_MAX_SIZE = 2**26  # numbers of a value over all blocks; a larger value counts as unknown

# The work for a value on a range of rows and columns, relative to one on whole blocks.
_TABLES = 4


class _Selection:
    """The values of nodes on every block, on its selected rows and columns."""

    def __init__(self, layout: Layout, masks=None, ranges=None, operand=None):
        self.layout = layout
        self.masks = masks or {}  # which positions are selected, by side
        self.ranges = ranges or {}  # first and last row or column, within each block
        self.operand = operand or self.value
        self.memo: dict[Node, Interval] = {}

    @property
    def effort(self) -> int:
        """Gives how much was evaluated; ranges count more, because of their tables."""
        return len(self.memo) * (_TABLES if self.ranges else 1)

    def is_inhabited(self):
        """Says on which blocks anything is selected."""
        anywhere = [self._reduced(mask, "any") for mask in self.masks.values()]
        return functools.reduce(operator.and_, anywhere, TRUE)

    def value(self, node: Node) -> Interval:
        """Returns the values of a node."""
        if node not in self.memo:
            if node.dense is not None:
                self.memo[node] = self.summary(node.dense, node.sides)
            else:
                operands = [self.operand(x) for x in node.operands]
                fits = size(operands, node.operation.result) <= _MAX_SIZE
                result = node.operation.result
                value = apply(node.operation, operands) if fits else unknown(result)
                self.memo[node] = value
        return self.memo[node]

    def summary(self, x: Interval, sides) -> Interval:
        """Returns the extremes of a one-sided value over the selected positions."""
        if not sides:
            return x
        lo, hi = x
        mask = self.masks.get(tuple(sides))
        if mask is not None:
            least, most = extremes(lo.dtype)
            mask = mask.reshape(mask.shape + (1,) * (lo.ndim - mask.ndim))
            xp = namespace(mask, lo, hi)
            # Positions that are not selected must not be the least or the greatest.
            lo, hi = xp.where(mask, lo, most), xp.where(mask, hi, least)
        side = min(sides)
        is_single = len(sides) == 1 and lo.ndim == TRUE.ndim and lo.shape[side] > 1
        if side in self.ranges and is_single:
            return typed(self._within(Interval(lo, hi), side), x.lo.dtype)
        ends = Interval(self._reduced(lo, "min"), self._reduced(hi, "max"))
        return typed(ends, x.lo.dtype)

    def _reduced(self, array, extreme: str):
        for side, block in self.layout.sizes.items():
            array = per_block(array, side, block, extreme)
        return array

    def _within(self, x: Interval, side: int) -> Interval:
        """Returns, for each pair of blocks, the extremes over its range of one side."""
        xp, shape = namespace(*x), np.broadcast_shapes(*(bound.shape for bound in x))
        # A value that is the same for all examples or heads is not indexed by them.
        axes = [axis for axis in (0, 1) if shape[axis] > 1]
        indices = [np.arange(n, dtype=np.int32) for n in shape[:2]]
        own = indices[0].reshape(-1, 1, 1, 1), indices[1].reshape(1, -1, 1, 1)
        sizes = [shape[axis] for axis in axes]
        table = both(x, lambda a: xp.broadcast_to(a, shape).reshape(*sizes, -1))
        return range_extremes(table, [*(point(own[i]) for i in axes), self.ranges[side]])


def _selected(literals, equalities) -> dict:
    """Returns, by side, the positions where one-sided literals and equalities may hold."""
    masks = {}
    for node, positive in literals:
        mask, side = _possible(node.dense, positive), tuple(node.sides)
        masks[side] = masks[side] & mask if side in masks else mask
    for node, _ in equalities:
        # x = y is only possible for x within the range of the selected y.
        for x, y in itertools.permutations(node.operands):
            if (mask := masks.get(tuple(y.sides))) is not None:
                allowed = _between(x.dense, *_span(y.dense, mask))
                masks[tuple(x.sides)] = masks.get(tuple(x.sides), TRUE) & allowed
    return masks


def _between(x: Interval, least, most):
    return (x.hi >= least) & (x.lo <= most)


def _span(x: Interval, mask):
    """Returns the extremes of a one-sided value over all selected positions."""
    xp: Any = namespace(*x, mask)
    least, most = extremes(x.lo.dtype)
    lo, hi = xp.where(mask, x.lo, most), xp.where(mask, x.hi, least)
    axes = (QUERY, KEY)
    return (
        xp.min(lo, axis=axes, keepdims=True, initial=most),
        xp.max(hi, axis=axes, keepdims=True, initial=least),
    )


def _possible(x: Interval, positive: bool):
    """Says where a Boolean, or its negation, is possible."""
    return x.hi if positive else ~x.lo


def per_block(array, axis: int, size: int, extreme: str):
    """Reduces an axis block by block; an axis of length 1 stays as it is."""
    length = array.shape[axis]
    if length == 1:
        return array
    xp = namespace(array)
    # The last block is filled with its last value, which changes no extreme.
    if extra := -length % size:
        widths = [(0, extra if i == axis else 0) for i in range(array.ndim)]
        array = xp.pad(array, widths, mode="edge")
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    cut = array.reshape(*before, -(-length // size), size, *after)
    return getattr(xp, extreme)(cut, axis + 1)
