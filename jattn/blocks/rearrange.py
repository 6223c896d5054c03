"""Interval rules for types, shapes, reductions and indexing an array.

Indexing gives the least and the greatest value of the array between the bounds of
its index, from a sparse table of powers of two, so it costs O(array · log) once
and O(1) per block. A single index (not a range) is plain indexing, and a known run
of consecutive ones is a slice.
"""

import functools
import itertools
import math
import operator

import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks.intervals import (
    Interval,
    attribute,
    both,
    extremes,
    is_float,
    namespace,
    point,
    rule,
    unless,
)

_LEAD = 4


@rule("convert_element_type")
def _convert(xp, op, x):
    source, target = op.operands[0].dtype, op.result.dtype
    cast = lambda a: a.astype(target)
    if source in (target, np.bool_):
        return x if source == target else both(x, cast)
    if target == np.bool_:
        zero = (x.lo <= 0) & (x.hi >= 0)
        return Interval((x.lo > 0) | (x.hi < 0), ~(zero & (x.lo == x.hi)))
    if jnp.issubdtype(target, jnp.floating):
        narrows = is_float(op.operands[0]) and not np.can_cast(source, target)
        return _narrowed(xp, x, target) if narrows else both(x, cast)
    if not is_float(op.operands[0]) and x.lo is x.hi:
        return both(x, cast)
    return unless(xp, ~_fits(x, target), *both(x, cast), op.result)


def _narrowed(xp, x: Interval, target):
    """Rounds outwards: XLA may round, or drop the conversion."""
    lo, hi = (a.astype(target) for a in x)
    least, most = extremes(target)
    exact = [a.astype(b.dtype) == b for a, b in zip((lo, hi), x, strict=True)]
    lo = xp.where(exact[0], lo, xp.nextafter(lo, least))
    return Interval(lo, xp.where(exact[1], hi, xp.nextafter(hi, most)))


def _fits(x: Interval, target):
    """Returns whether casting to an integer type keeps the order of a range."""
    if np.can_cast(x.lo.dtype, target):
        return x.lo <= x.hi
    least, most = extremes(target)
    if jnp.issubdtype(x.lo.dtype, jnp.floating):
        return (x.lo >= 0.999 * float(least)) & (x.hi <= 0.999 * float(most))
    own = extremes(x.lo.dtype)
    least, most = max(int(least), int(own[0])), min(int(most), int(own[1]))
    kind = x.lo.dtype.type
    return (x.lo >= kind(least)) & (x.hi <= kind(most))


@rule("copy", "copy_p", "optimization_barrier")
def _same(xp, op, x):
    return x


# Shapes: the axes of the value come after the leading ones.


def _shift(axes):
    return tuple(axis + _LEAD for axis in axes)


@rule("broadcast_in_dim")
def _broadcast_in_dim(xp, op, x):
    shape, axes = op.parameter("shape"), op.parameter("broadcast_dimensions")
    sizes = [1] * len(shape)
    for axis, size in zip(axes, op.operands[0].shape, strict=True):
        sizes[axis] = size

    def spread(a):
        lead = a.shape[:_LEAD]
        return xp.broadcast_to(a.reshape(lead + tuple(sizes)), lead + tuple(shape))

    return both(x, spread)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(xp, op, x):
    if op.name == "reshape" and op.parameter("dimensions") is not None:
        return None
    return both(x, lambda a: a.reshape(a.shape[:_LEAD] + op.result.shape))


@rule("transpose")
def _transpose(xp, op, x):
    order = (*range(_LEAD), *_shift(op.parameter("permutation")))
    return both(x, lambda a: xp.transpose(a, order))


@rule("rev")
def _rev(xp, op, x):
    return both(x, lambda a: xp.flip(a, _shift(op.parameter("dimensions"))))


@rule("slice")
def _slice(xp, op, x):
    starts, limits = op.parameter("start_indices"), op.parameter("limit_indices")
    strides = op.parameter("strides") or (1,) * len(starts)
    index = (slice(None),) * _LEAD + tuple(map(slice, starts, limits, strides))
    return both(x, lambda a: a[index])


@rule("concatenate", "stack")
def _concatenate(xp, op, *xs):
    axis = op.parameter("axis" if op.name == "stack" else "dimension") + _LEAD
    join = xp.stack if op.name == "stack" else xp.concatenate
    lead = np.broadcast_shapes(*(a.shape[:_LEAD] for x in xs for a in x))

    def gathered(bounds):
        return join([xp.broadcast_to(a, lead + a.shape[_LEAD:]) for a in bounds], axis)

    lo = gathered([x.lo for x in xs])
    same = all(x.lo is x.hi for x in xs)
    return Interval(lo, lo if same else gathered([x.hi for x in xs]))


@rule("iota")
def _iota(xp, op):
    sizes = [1] * (_LEAD + len(op.result.shape))
    axis = op.parameter("dimension")
    sizes[_LEAD + axis] = op.result.shape[axis]
    line = np.arange(op.result.shape[axis]).astype(op.result.dtype).reshape(sizes)
    return point(np.broadcast_to(line, (1,) * _LEAD + op.result.shape))


# Reductions.


def _reduction(name):
    def apply_rule(xp, op, x):
        if 0 in op.operands[0].shape:
            return None
        return both(x, lambda a: getattr(xp, name)(a, _shift(op.parameter("axes"))))

    return apply_rule


rule("reduce_and")(_reduction("all"))
rule("reduce_or")(_reduction("any"))
rule("reduce_max")(_reduction("max"))
rule("reduce_min")(_reduction("min"))


@rule("reduce_sum")
def _reduce_sum(xp, op, x):
    if is_float(op.result):
        return None  # The order of the additions is the compiler's.
    axes, dtype = _shift(op.parameter("axes")), op.result.dtype
    size = sum(xp.sum(abs(a.astype(np.float32)), axes) for a in x)
    bad = ~(size < 0.999 * float(extremes(dtype)[1]))
    bounds = both(x, lambda a: xp.sum(a, axes, dtype=dtype))
    return bounds if x.lo is x.hi else unless(xp, bad, *bounds, op.result)


# Indexing.


@rule("dynamic_slice")
def _dynamic_slice(xp, op, x, *starts):
    sizes, shape = op.parameter("slice_sizes"), op.operands[0].shape
    if any(1 < size < whole for size, whole in zip(sizes, shape, strict=True)):
        return None
    indexed = [i for i, size in enumerate(sizes) if size == 1 and shape[i] != 1]
    return _index(op, x, {i: starts[i] for i in indexed})


@rule("gather")
def _gather(xp, op, x, where):
    names, shape = op.parameter("dimension_numbers"), op.operands[0].shape
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
    """Returns whether an index is out of bounds."""
    low, high = x.lo.dtype.type(0), x.lo.dtype.type(size - 1)
    return Interval((x.hi < low) | (x.lo > high), (x.lo < low) | (x.hi > high))


def _filled(op, inside: Interval, outside: list[Interval], mode: str):
    """Replaces what is out of bounds by the fill value, or by anything."""
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
    """Returns the values of an array between the bounds of its indices, clamped."""
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
    last = kind(min(size - 1, extremes(index.dtype)[1]))
    return xp.clip(index, kind(0), last).astype(np.int32)


def _take(table, indices):
    """Indexes the first axes of an array."""
    lead = np.broadcast_shapes(*(i.shape for i in indices))
    runs = [_run(index) for index in indices]
    axes = [axis for axis, _ in runs if axis is not None]
    if len(axes) == len(runs) and sorted(set(axes)) == axes:
        return table[tuple(run for _, run in runs)].reshape(lead + table.shape[len(runs) :])
    if namespace(table, *indices) is np:
        return table[tuple(indices)]
    place = jnp.asarray(table).at[tuple(indices)]
    return place.get(mode="promise_in_bounds", wrap_negative_indices=False)


def _run(index):
    """Returns the axis and slice of a known run of consecutive indices."""
    long = [axis for axis, size in enumerate(index.shape) if size != 1]
    if not isinstance(index, np.ndarray) or len(long) > 1 or not index.size:
        return None, None
    first, line = int(index.flat[0]), index.ravel()
    if not np.array_equal(line, np.arange(first, first + line.size)):
        return None, None
    return (long[0] if long else -1), slice(first, first + line.size)


def range_extremes(table: Interval, parts: list[Interval]) -> Interval:
    """Returns the extremes of an array over ranges of its first axes.

    One axis may have a true range; a range in another one takes the whole array.
    """
    # The greatest is the least of the opposite, so one table of powers serves for both.
    xp = namespace(*table, *(bound for p in parts for bound in p))
    both_ends = xp.stack([table.lo, _opposite(xp, table.hi)], -1)
    last = max(i for i, p in enumerate(parts) if p.lo is not p.hi)
    others = parts[:last] + parts[last + 1 :]
    levels = _levels(both_ends, last)
    lo, hi = parts[last]
    # A mask that selects nothing leaves an empty range: any answer will do there.
    hi = xp.maximum(lo, hi)
    sizes = 2 ** np.arange(1, len(levels), dtype=np.int32)
    sizes = sizes.reshape(-1, *[1] * lo.ndim)
    power = xp.sum(((hi - lo + 1)[None] >= sizes).astype(lo.dtype), 0, dtype=lo.dtype)
    right = hi + 1 - xp.left_shift(xp.ones_like(hi), power)
    rest = [p.lo for p in others]
    first, second = (_take(levels, [power, x, *rest]) for x in (lo, right))
    result = xp.minimum(first, second)
    if any(p.lo is not p.hi for p in others):
        single = functools.reduce(operator.and_, (p.lo == p.hi for p in others))
        whole = levels[0].min(tuple(range(len(parts))))
        whole = whole.reshape((1,) * _LEAD + whole.shape)
        single = single.reshape(single.shape + (1,) * (result.ndim - single.ndim))
        result = xp.where(single, result, whole)
    return Interval(result[..., 0], _opposite(xp, result[..., 1]))


def _opposite(xp, array):
    """Returns an array in the opposite order, from which it comes back."""
    return -array if jnp.issubdtype(array.dtype, jnp.floating) else ~array


def _levels(table, axis: int):
    """Returns the least of 1, 2, 4, … neighbours along an axis, moved first."""
    xp = namespace(table)
    table = xp.moveaxis(table, axis, 0)
    index = np.arange(len(table), dtype=np.int32)
    steps = 2 ** np.arange(int(math.log2(len(table))), dtype=np.int32)

    def double(level, step):
        # Near the end, fewer neighbours: all that a range inside the array needs.
        shifted = level[xp.minimum(index + step, len(table) - 1)]
        level = xp.minimum(level, shifted)
        return level, level

    if xp is not np:
        # A loop: unrolled, XLA takes seconds to fuse the levels.
        return jnp.concatenate([table[None], lax.scan(double, table, steps)[1]])
    levels = itertools.accumulate(steps, lambda x, step: double(x, step)[0], initial=table)
    return np.stack(list(levels))
