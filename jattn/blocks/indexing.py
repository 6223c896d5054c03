"""The rules of indexing: which values of an array a range of indices may read.

The result has the least and the greatest value of the array between the bounds of its
index. A single index, not a range, is plain indexing.
"""

import functools
import operator

import numpy as np

from jattn.blocks.intervals import (
    Interval,
    attribute,
    both,
    extremes,
    namespace,
    rule,
    unless,
)
from jattn.blocks.ranges import range_extremes, take
from jattn.blocks.rearrange import _LEAD


@rule("dynamic_slice")
def _dynamic_slice(xp, op, x, *starts):
    sizes, shape = op.parameter("slice_sizes"), op.operands[0].shape
    # Each axis must be indexed by a single number or read as a whole.
    if any(1 < size < whole for size, whole in zip(sizes, shape, strict=True)):
        return None
    indexed = [i for i, size in enumerate(sizes) if size == 1 and shape[i] != 1]
    return _index(op, x, {i: starts[i] for i in indexed})


@rule("gather")
def _gather(xp, op, x, where):
    names, shape = op.parameter("dimension_numbers"), op.operands[0].shape
    # The rule is for one index vector, which picks a single element or whole axes: what
    # `array[i, j]` becomes for scalars i and j.
    axes = attribute(names, "start_index_map")
    whole = [1 if i in axes else size for i, size in enumerate(shape)]
    plain = tuple(sorted(axes)) == tuple(attribute(names, "collapsed_slice_dims"))
    if op.operands[1].ndim != 1 or not plain or list(op.parameter("slice_sizes")) != whole:
        return None
    parts = {axis: both(where, lambda a, i=i: a[..., i]) for i, axis in enumerate(axes)}
    inside = _index(op, x, parts)
    mode = attribute(op.parameter("mode"), "name")
    if inside is None or mode == "CLIP":
        return inside
    outside = [_outside(part, shape[axis]) for axis, part in parts.items()]
    return _filled(op, inside, outside, mode)


def _outside(x: Interval, size: int) -> Interval:
    """Says where an index is definitely, and where possibly, out of bounds."""
    low, high = x.lo.dtype.type(0), _last(x.lo.dtype, size)
    return Interval((x.hi < low) | (x.lo > high), (x.lo < low) | (x.hi > high))


def _filled(op, inside: Interval, outside: list[Interval], mode: str):
    """Replaces values out of bounds by the fill value, or by all values of the type."""
    definitely = functools.reduce(operator.or_, [x.lo for x in outside])
    possibly = functools.reduce(operator.or_, [x.hi for x in outside])
    if isinstance(possibly, np.ndarray) and not possibly.any():
        return inside
    xp = namespace(possibly, *inside)
    trail = (1,) * len(op.result.shape)
    definitely, possibly = (a.reshape(a.shape + trail) for a in (definitely, possibly))
    fill = op.parameter("fill_value")
    if mode != "FILL_OR_DROP" or fill is None:
        return unless(xp, possibly, *inside, op.result)
    fill = np.asarray(fill, op.result.dtype)
    lo = xp.where(possibly, xp.minimum(inside.lo, fill), inside.lo)
    hi = xp.where(possibly, xp.maximum(inside.hi, fill), inside.hi)
    return Interval(xp.where(definitely, fill, lo), xp.where(definitely, fill, hi))


def _index(op, x: Interval, parts: dict[int, Interval]):
    """Returns the values of an array between the bounds of its clamped indices."""
    shape = op.operands[0].shape
    if 0 in shape or any(a.shape[:_LEAD] != (1,) * _LEAD for a in x):
        return None
    if not parts:
        return both(x, lambda a: a.reshape(a.shape[:_LEAD] + op.result.shape))
    order = [*parts, *(i for i in range(len(shape)) if i not in parts)]
    clamped = [both(p, lambda a, i=i: _clamped(a, shape[i])) for i, p in parts.items()]
    table = both(x, lambda a: a.reshape(shape).transpose(tuple(order)))
    if all(p.lo is p.hi for p in clamped):
        result = both(table, lambda a: take(a, [p.lo for p in clamped]))
    else:
        result = range_extremes(table, clamped)
    return both(result, lambda a: a.reshape(a.shape[:_LEAD] + op.result.shape))


def _clamped(index, size: int):
    xp, kind = namespace(index), index.dtype.type
    return xp.clip(index, kind(0), _last(index.dtype, size)).astype(np.int32)


def _last(dtype, size: int):
    """Returns the last index of an axis that an integer type holds."""
    return dtype.type(min(size - 1, extremes(dtype)[1]))
