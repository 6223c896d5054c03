"""The rules of sums and products: what they do to a range of values.

Integers wrap around, so a bound that may leave its type gives all values of the type.
Floats round monotonically, so the bounds of a sum are the sums of bounds. Products are
widened a little, since compilers fuse and rearrange them.
"""

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks.intervals import (
    Interval,
    both,
    elementwise,
    extremes,
    is_float,
    point,
    unless,
)


def _floats(xp, aval, lo, hi, *doubtful) -> Interval:
    """Returns lo … hi, or all values where one of the doubtful numbers is NaN."""
    bad = functools.reduce(operator.or_, map(xp.isnan, doubtful))
    return unless(xp, bad, lo, hi, aval)


def outward(xp, aval, x: Interval, steps: int) -> Interval:
    """Widens bounds by `steps` units in the last place, and by the least normal number.

    Compilers fuse operations, which changes the rounding, and flush denormals to zero.
    """
    info, kind = jnp.finfo(aval.dtype), aval.dtype.type
    # A unit in the last place is at most eps times the number; twice that is safe.
    part, tiny = kind(2 * steps * float(info.eps)), kind(info.tiny)
    lo, hi = x.lo - (abs(x.lo) * part + tiny), x.hi + (abs(x.hi) * part + tiny)
    # An infinite bound is exact: −∞ must stay −∞ for a block to be skipped.
    lo = xp.where(xp.isinf(x.lo), x.lo, lo)
    return Interval(lo, xp.where(xp.isinf(x.hi), x.hi, hi))


def corners(xp, function, x: Interval, y: Interval):
    """Bounds a function that is monotone in each operand, by its values at the corners."""
    values = [function(a, b) for a in x for b in y]
    return functools.reduce(xp.minimum, values), functools.reduce(xp.maximum, values)


def holds_zero(x: Interval):
    """Says whether zero is between the bounds."""
    return (x.lo <= 0) & (x.hi >= 0)


@elementwise("add", "add_any", point=operator.add)
def _add(xp, op, x, y):
    lo, hi = x.lo + y.lo, x.hi + y.hi
    if is_float(op.result):  # if ∞ − ∞ or NaN is possible, one of the mixed sums is NaN
        return _floats(xp, op.result, lo, hi, x.lo + y.hi, x.hi + y.lo)
    # A sum has wrapped around if adding y ≥ 0 gave less than x, or y < 0 gave more.
    wraps = ((y.lo >= 0) != (lo >= x.lo)) | ((y.hi >= 0) != (hi >= x.hi))
    return unless(xp, wraps, lo, hi, op.result)


@elementwise("sub", point=operator.sub)
def _sub(xp, op, x, y):
    lo, hi = x.lo - y.hi, x.hi - y.lo
    if is_float(op.result):
        return _floats(xp, op.result, lo, hi, x.lo - y.lo, x.hi - y.hi)
    wraps = ((y.hi >= 0) != (lo <= x.lo)) | ((y.lo >= 0) != (hi <= x.hi))
    return unless(xp, wraps, lo, hi, op.result)


@elementwise("mul", point=operator.mul)
def _mul(xp, op, x, y):
    lo, hi = corners(xp, operator.mul, x, y)
    if is_float(op.result):
        widened = outward(xp, op.result, Interval(lo, hi), 1)
        # 0 · ∞ is NaN.
        infinite = [xp.isinf(a.lo) | xp.isinf(a.hi) for a in (x, y)]
        bad = (holds_zero(x) & infinite[1]) | (holds_zero(y) & infinite[0])
        return unless(xp, bad | xp.isnan(lo) | xp.isnan(hi), *widened, op.result)
    # Integer products wrap around without a trace; float32 ones only lose precision.
    estimate = corners(xp, operator.mul, *(both(a, _as_float32) for a in (x, y)))
    return unless(xp, _leaves(op.result, *estimate), lo, hi, op.result)


def _as_float32(array):
    return array.astype(np.float32)


def _leaves(aval, lo, hi):
    """Says whether float32 bounds come near the ends of an integer type, or pass them."""
    # 0.1 % is far more than the rounding of the float32 bounds.
    least, most = (0.999 * float(end) for end in extremes(aval.dtype))
    return ~((lo >= least) & (hi <= most))


@elementwise("square", "integer_pow")
def _square(xp, op, x):
    if op.name == "integer_pow" and op.parameter("y") != 2:
        return None
    size = _abs(xp, op, x)
    return None if size is None else _mul(xp, op, size, size)


@elementwise("neg", point=operator.neg)
def _neg(xp, op, x):
    if is_float(op.result):
        return Interval(-x.hi, -x.lo)
    zero = point(xp.zeros_like(x.lo))
    return _sub(xp, op, zero, x)


@elementwise("abs", point=abs)
def _abs(xp, op, x):
    if jnp.issubdtype(op.result.dtype, jnp.unsignedinteger):
        return x
    low = xp.maximum(xp.maximum(x.lo, -x.hi), xp.zeros_like(x.lo))
    high = xp.maximum(-x.lo, x.hi)
    # The least integer has no opposite. For floats nothing wraps: no number equals NaN.
    wraps = x.lo == (np.nan if is_float(op.result) else extremes(x.lo.dtype)[0])
    return unless(xp, wraps, low, high, op.result)


@elementwise("sign")
def _sign(xp, op, x):
    return both(x, xp.sign)


@elementwise("max")
def _max(xp, op, x, y):
    return _pairwise(xp.maximum, x, y)


@elementwise("min")
def _min(xp, op, x, y):
    return _pairwise(xp.minimum, x, y)


@elementwise("clamp")
def _clamp(xp, op, least, x, most):
    return _pairwise(xp.minimum, _pairwise(xp.maximum, x, least), most)


def _pairwise(function, x, y) -> Interval:
    lo = function(x.lo, y.lo)
    same = x.lo is x.hi and y.lo is y.hi
    return Interval(lo, lo if same else function(x.hi, y.hi))


@elementwise("floor", "ceil", "round")
def _rounded(xp, op, x):
    if op.name != "round":
        return both(x, getattr(xp, op.name))
    # The other method rounds halves away from zero, which `rint` does not.
    method = op.parameter("rounding_method")
    return both(x, xp.rint) if method == lax.RoundingMethod.TO_NEAREST_EVEN else None


@elementwise("tanh", "erf")
def _bounded(xp, op, x):
    one = xp.ones_like(x.lo)
    return _floats(xp, op.result, -one, one, x.lo, x.hi)
