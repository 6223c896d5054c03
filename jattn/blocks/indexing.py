"""The rules of indexing: which values of an array a range of indices may read.

The result has the least and the greatest value of the array between the bounds of its
index. They come from a sparse table of powers of two, which costs O(array · log) once and
O(1) for each block; on a GPU from comparing each index with each range. A single index, not
a range, is plain indexing, and a known run of consecutive indices is a slice.
"""

import functools
import itertools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks.intervals import (
    Interval,
    attribute,
    both,
    extremes,
    namespace,
    rule,
    unless,
)
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
        result = both(table, lambda a: _take(a, [p.lo for p in clamped]))
    else:
        result = range_extremes(table, clamped)
    return both(result, lambda a: a.reshape(a.shape[:_LEAD] + op.result.shape))


def _clamped(index, size: int):
    xp, kind = namespace(index), index.dtype.type
    return xp.clip(index, kind(0), _last(index.dtype, size)).astype(np.int32)


def _last(dtype, size: int):
    """Returns the last index of an axis that an integer type holds."""
    return dtype.type(min(size - 1, extremes(dtype)[1]))


def _take(table, indices):
    """Indexes the first axes of an array."""
    lead = np.broadcast_shapes(*(i.shape for i in indices))
    runs = [_run(index) for index in indices]
    axes = [axis for axis, _ in runs if axis is not None]
    # Runs along different axes, in order, need only a slice, no gather.
    if len(axes) == len(runs) and sorted(set(axes)) == axes:
        return table[tuple(run for _, run in runs)].reshape(lead + table.shape[len(runs) :])
    if namespace(table, *indices) is np:
        return table[tuple(indices)]
    place = jnp.asarray(table).at[tuple(indices)]
    return place.get(mode="promise_in_bounds", wrap_negative_indices=False)


def _run(index):
    """Returns the axis and the slice of a known run of consecutive indices, else None."""
    long = [axis for axis, size in enumerate(index.shape) if size != 1]
    if not isinstance(index, np.ndarray) or len(long) > 1 or not index.size:
        return None, None
    first, line = int(index.flat[0]), index.ravel()
    if not np.array_equal(line, np.arange(first, first + line.size)):
        return None, None
    return (long[0] if long else -1), slice(first, first + line.size)


# A GPU makes this many comparisons in some 30 µs (estimated).
_MOST_COMPARED = 2**26


def range_extremes(table: Interval, parts: list[Interval]) -> Interval:
    """Returns the extremes of an array over ranges of its first axes.

    Only one axis may have a true range. Where another axis has one too, the result is the
    extremes of the whole array.
    """
    # The greatest value is the least one in the opposite order, so one table of least
    # values serves for both.
    xp = namespace(*table, *(bound for p in parts for bound in p))
    both_ends: Any = xp.stack([table.lo, _opposite(xp, table.hi)], -1)
    last = max(i for i, p in enumerate(parts) if p.lo is not p.hi)
    others = parts[:last] + parts[last + 1 :]
    rest = [p.lo for p in others]
    lo, hi = parts[last]
    # A mask that selects nothing leaves an empty range, where any answer is right.
    hi = xp.maximum(lo, hi)
    result = _least(xp.moveaxis(both_ends, last, len(rest)), lo, hi, *rest)
    if any(p.lo is not p.hi for p in others):
        single = functools.reduce(operator.and_, (p.lo == p.hi for p in others))
        whole = both_ends.min(tuple(range(len(parts))))
        whole = whole.reshape((1,) * _LEAD + whole.shape)
        single = single.reshape(single.shape + (1,) * (result.ndim - single.ndim))
        result = xp.where(single, result, whole)
    return Interval(result[..., 0], _opposite(xp, result[..., 1]))


def _least(table, lo, hi, *rest):
    """Returns the least of each range of an axis, at indices of the axes before it."""
    if namespace(table, lo, hi, *rest) is np:
        return _least_of_levels(table, lo, hi, *rest)
    shape = np.broadcast_shapes(lo.shape, hi.shape, *(x.shape for x in rest))
    arrays = [jnp.asarray(x) for x in (table, lo, hi, *rest)]
    if math.prod(shape) * table.shape[len(rest)] > _MOST_COMPARED:
        return _least_of_levels(*arrays)
    # On a GPU a loop launches some kernels in each turn, 100 in all for 4096 numbers. On a
    # CPU the comparisons take up to 200 times as long as the loop.
    return lax.platform_dependent(*arrays, cuda=_least_in, default=_least_of_levels)


def _least_in(table, lo, hi, *rest):
    """Compares each index of the axis with the ends of each range, in one pass."""
    numbers = _take(table, rest) if rest else table.reshape((1,) * _LEAD + table.shape)
    index = np.arange(numbers.shape[_LEAD], dtype=np.int32)
    index = index.reshape((1,) * _LEAD + index.shape)
    inside = (index >= lo[..., None]) & (index <= hi[..., None])
    inside = inside.reshape(inside.shape + (1,) * (numbers.ndim - inside.ndim))
    greatest = extremes(numbers.dtype)[1]
    if greatest != greatest:  # a type without ∞
        greatest = jnp.finfo(numbers.dtype).max
    return jnp.min(numbers, axis=_LEAD, where=inside, initial=greatest)


def _least_of_levels(table, lo, hi, *rest):
    """Looks two numbers up in a table of the least of 1, 2, 4, … neighbours.

    A range of n numbers is two overlapping ranges of 2^power ≤ n numbers: the one that
    starts at its left end, and the one that ends at its right end.
    """
    levels = _levels(table, len(rest))
    xp = namespace(levels, lo, hi)
    sizes = 2 ** np.arange(1, len(levels), dtype=np.int32)
    sizes = sizes.reshape(-1, *[1] * lo.ndim)
    power = xp.sum(((hi - lo + 1)[None] >= sizes).astype(lo.dtype), 0, dtype=lo.dtype)
    right = hi + 1 - xp.left_shift(xp.ones_like(hi), power)
    first, second = (_take(levels, [power, x, *rest]) for x in (lo, right))
    return xp.minimum(first, second)


def _opposite(xp, array):
    """Reverses the order of an array's numbers; applied twice, it changes nothing."""
    return -array if jnp.issubdtype(array.dtype, jnp.floating) else ~array


def _levels(table, axis: int):
    """Returns the least of 1, 2, 4, … neighbours along an axis, which becomes the first."""
    xp = namespace(table)
    table = xp.moveaxis(table, axis, 0)
    index = np.arange(len(table), dtype=np.int32)
    steps = 2 ** np.arange(int(math.log2(len(table))), dtype=np.int32)

    def double(level, step):
        # Near the end there are fewer neighbours. No range inside the array needs more.
        shifted = level[xp.minimum(index + step, len(table) - 1)]
        level = xp.minimum(level, shifted)
        return level, level

    if xp is not np:
        # A loop, because XLA would take seconds to fuse the levels of an unrolled one.
        return jnp.concatenate([table[None], lax.scan(double, table, steps)[1]])
    levels = itertools.accumulate(steps, lambda x, step: double(x, step)[0], initial=table)
    return np.stack(list(levels))
