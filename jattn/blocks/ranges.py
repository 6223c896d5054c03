"""The least and the greatest value of an array over ranges of indices.

They come from a sparse table of powers of two, which costs O(array · log) once and O(1) for
each range; on a GPU from comparing indices with each range. Where the indices are known and
consecutive, a look-up is a slice.
"""

import functools
import itertools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks.intervals import Interval, extremes, namespace
from jattn.blocks.rearrange import _LEAD


def take(table, indices):
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


# A GPU makes so many comparisons in about 90 µs, which is what a loop takes (estimated).
_MOST_COMPARED = 2**26
_MOST_AT_ONCE = 2**24  # beyond, the kernels that parts take more cost less than comparing


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
    count, cells = table.shape[len(rest)], math.prod(shape)
    size = _part(count, cells)
    if cells * (count // size + 2 * size) > _MOST_COMPARED:
        return _least_of_levels(*arrays)
    # On a GPU a loop launches some kernels in each turn, 130 in all for 16384 numbers. On a
    # CPU the comparisons take up to 200 times as long as the loop.
    compare = functools.partial(_least_in, size)
    return lax.platform_dependent(*arrays, cuda=compare, default=_least_of_levels)


def _part(count: int, cells: int) -> int:
    """Chooses how many numbers make a part: about the square root, a power of 2."""
    return 1 if count * cells <= _MOST_AT_ONCE else 2 ** (count.bit_length() // 2)


def _least_in(size: int, table, lo, hi, *rest):
    """Compares indices of an axis with the ends of each range, in parts of some numbers.

    A range is some whole parts, and what it has of the parts where it begins and ends.
    """
    axis, greatest = len(rest), extremes(table.dtype)[1]
    if greatest != greatest:  # a type without ∞
        greatest = jnp.finfo(table.dtype).max
    widths = [(0, -x % size if i == axis else 0) for i, x in enumerate(table.shape)]
    table = jnp.pad(table, widths, constant_values=greatest)
    split = table.reshape(*table.shape[:axis], -1, size, *table.shape[axis + 1 :])
    parts = jnp.min(split, axis=axis + 1)

    def least(table, index, lo, hi):
        numbers = take(table, [*(x[..., None] for x in rest), index])
        inside = (index >= lo[..., None]) & (index <= hi[..., None])
        inside = inside.reshape(inside.shape + (1,) * (numbers.ndim - inside.ndim))
        return jnp.min(numbers, axis=_LEAD, where=inside, initial=greatest)

    count = lambda n: np.arange(n, dtype=np.int32).reshape((1,) * _LEAD + (n,))
    first, last = (lo + (size - 1)) // size, (hi + 1) // size - 1
    found = least(parts, count(parts.shape[axis]), first, last)
    for end in (lo, hi) if size > 1 else ():
        index = (end // size * size)[..., None] + count(size)
        found = jnp.minimum(found, least(table, index, lo, hi))
    return found


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
    first, second = (take(levels, [power, x, *rest]) for x in (lo, right))
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
