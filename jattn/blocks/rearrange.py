"""Interval rules for types, shapes and reductions."""

import jax.numpy as jnp
import numpy as np

from jattn.blocks.intervals import (
    Interval,
    both,
    extremes,
    is_float,
    point,
    rule,
    unless,
)

_LEAD = 4  # the axes example, head, query and key, before the axes of the value itself


@rule("convert_element_type")
def _convert(xp, op, x):
    source, target = op.operands[0].dtype, op.result.dtype
    cast = lambda a: a.astype(target)
    if source in (target, np.bool_):
        return x if source == target else both(x, cast)
    if target == np.bool_:
        # Definitely True without 0 in the range; definitely False if 0 is all of it.
        zero = (x.lo <= 0) & (x.hi >= 0)
        return Interval((x.lo > 0) | (x.hi < 0), ~(zero & (x.lo == x.hi)))
    if jnp.issubdtype(target, jnp.floating):
        narrows = is_float(op.operands[0]) and not np.can_cast(source, target)
        return _narrowed(xp, x, target) if narrows else both(x, cast)
    if not is_float(op.operands[0]) and x.lo is x.hi:
        return both(x, cast)
    return unless(xp, ~_fits(x, target), *both(x, cast), op.result)


def _narrowed(xp, x: Interval, target):
    """Rounds bounds outwards, since XLA may round values, or drop the conversion."""
    lo, hi = (a.astype(target) for a in x)
    least, most = extremes(target)
    exact = [a.astype(b.dtype) == b for a, b in zip((lo, hi), x, strict=True)]
    lo = xp.where(exact[0], lo, xp.nextafter(lo, least))
    return Interval(lo, xp.where(exact[1], hi, xp.nextafter(hi, most)))


def _fits(x: Interval, target):
    """Says whether casting to an integer type keeps the order of a range."""
    if np.can_cast(x.lo.dtype, target):
        return x.lo <= x.hi
    least, most = extremes(target)
    # A margin of 0.1 %, since the ends of the type are rounded as floats. NaN fits nowhere.
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
        return None  # the compiler chooses the order of the additions, and so the rounding
    axes, dtype = _shift(op.parameter("axes")), op.result.dtype
    # The sum of |lo| + |hi| bounds every partial sum. It is computed in float32, which
    # cannot wrap around, with a margin of 0.1 % for its rounding.
    size = sum(xp.sum(abs(a.astype(np.float32)), axes) for a in x)
    bad = ~(size < 0.999 * float(extremes(dtype)[1]))
    bounds = both(x, lambda a: xp.sum(a, axes, dtype=dtype))
    return bounds if x.lo is x.hi else unless(xp, bad, *bounds, op.result)
