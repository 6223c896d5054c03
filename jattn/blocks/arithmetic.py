"""The rules of arithmetic: what its primitives do to a range of values.

Integers wrap around, so a bound that may leave its type gives all values of the type.
Floats round monotonically, so the bounds of a sum are the sums of bounds. Products and
quotients are widened a little, since compilers fuse and rearrange them.
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


def _outward(xp, aval, x: Interval, steps: int) -> Interval:
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


def _corners(xp, function, x: Interval, y: Interval):
    """Bounds a function that is monotone in each operand, by its values at the corners."""
    values = [function(a, b) for a in x for b in y]
    return functools.reduce(xp.minimum, values), functools.reduce(xp.maximum, values)


def _holds_zero(x: Interval):
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
    lo, hi = _corners(xp, operator.mul, x, y)
    if is_float(op.result):
        widened = _outward(xp, op.result, Interval(lo, hi), 1)
        # 0 · ∞ is NaN.
        infinite = [xp.isinf(a.lo) | xp.isinf(a.hi) for a in (x, y)]
        bad = (_holds_zero(x) & infinite[1]) | (_holds_zero(y) & infinite[0])
        return unless(xp, bad | xp.isnan(lo) | xp.isnan(hi), *widened, op.result)
    # Integer products wrap around without a trace; float32 ones only lose precision.
    estimate = _corners(xp, operator.mul, *(both(a, _as_float32) for a in (x, y)))
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


def _truncated(a, b):
    quotient = a // b
    inexact = (quotient * b != a) & ((a < 0) != (b < 0))
    return quotient + inexact.astype(quotient.dtype)


def _as_result(op, x: Interval) -> Interval:
    """Returns a number in the type of the result, as the function of JAX converts it.

    A Python number is of 64 bits where these are on, beside positions of 32.
    """
    target = op.result.dtype
    if x.lo.dtype == target or x.lo is not x.hi:
        return x
    return both(x, lambda a: a.astype(target))


def _divisor(xp, op, x, y):
    """Returns a divisor that is never zero, and where the quotient is undefined."""
    bad = _holds_zero(y)
    if jnp.issubdtype(y.lo.dtype, jnp.signedinteger):
        least = extremes(y.lo.dtype)[0]
        # The least integer divided by −1 leaves the type.
        bad = bad | ((x.lo == least) & (y.lo <= -1) & (y.hi >= -1))
        bad = bad | (y.lo == least)  # it has no absolute value
    one = xp.ones_like(y.lo)
    return Interval(xp.where(bad, one, y.lo), xp.where(bad, one, y.hi)), bad


def _is_safe(x, y) -> bool:
    """Says whether both operands are single values, and the divisor is known and > 0.

    Then the quotient is defined for every x, also for a traced one.
    """
    same = x.lo is x.hi and y.lo is y.hi and isinstance(y.lo, np.ndarray)
    return same and bool(np.all((y.lo > 0) & (y.lo < extremes(y.lo.dtype)[1])))


def _quotient(function):
    def apply_rule(xp, op, x, y):
        x, y = _as_result(op, x), _as_result(op, y)
        if _is_safe(x, y):
            return point(function(x.lo, y.lo))
        y, bad = _divisor(xp, op, x, y)
        return unless(xp, bad, *_corners(xp, function, x, y), op.result)

    return apply_rule


@elementwise("div")
def _div(xp, op, x, y):
    if not is_float(op.result):
        return _quotient(_truncated)(xp, op, x, y)
    bounds = Interval(*_corners(xp, operator.truediv, x, y))
    bad = _holds_zero(y) | xp.isnan(bounds.lo) | xp.isnan(bounds.hi)
    return unless(xp, bad, *_outward(xp, op.result, bounds, 2), op.result)


def _remainder(quotient, ends):
    """Makes the rule of a remainder: exact within one period, otherwise its `ends`."""

    def apply_rule(xp, op, x, y):
        if is_float(op.result):
            return None
        x, y = _as_result(op, x), _as_result(op, y)
        if _is_safe(x, y):
            return point(x.lo - quotient(x.lo, y.lo) * y.lo)
        y, bad = _divisor(xp, op, x, y)
        first, last = quotient(x.lo, y.lo), quotient(x.hi, y.lo)
        period = (first == last) & (y.lo == y.hi)
        lo, hi = ends(xp, x, y)
        lo = xp.where(period, x.lo - first * y.lo, lo)
        hi = xp.where(period, x.hi - last * y.lo, hi)
        return unless(xp, bad, lo, hi, op.result)

    return apply_rule


def _ends_of_rem(xp, x, y):
    """Returns the bounds of `rem`, which has the sign of the dividend."""
    zero, one = xp.zeros_like(x.lo), xp.ones_like(y.lo)
    size = xp.maximum(abs(y.lo), abs(y.hi)) - one
    if jnp.issubdtype(x.lo.dtype, jnp.unsignedinteger):
        return zero, xp.minimum(x.hi, size)
    least = xp.maximum(xp.minimum(x.lo, zero), -size)
    return least, xp.minimum(xp.maximum(x.hi, zero), size)


def _ends_of_remainder(xp, x, y):
    """Returns the bounds of `remainder`, which has the sign of the divisor."""
    zero, one = xp.zeros_like(y.lo), xp.ones_like(y.lo)
    return xp.where(y.lo < 0, y.lo + one, zero), xp.where(y.hi > 0, y.hi - one, zero)


def _is_shift(op, y):
    return (y.lo >= 0) & (y.hi < jnp.iinfo(op.result.dtype).bits)


@elementwise("shift_left")
def _shift_left(xp, op, x, y):
    bad = ~_is_shift(op, y)
    y = both(y, lambda a: xp.where(bad, xp.zeros_like(a), a))
    lo, hi = _corners(xp, operator.lshift, x, y)
    # A bit was shifted out if shifting back gives another number.
    for a in x:
        bad = bad | ((a << y.hi).astype(a.dtype) >> y.hi != a)
    return unless(xp, bad, lo, hi, op.result)


@elementwise("shift_right_arithmetic", "shift_right_logical")
def _shift_right(xp, op, x, y):
    bad = ~_is_shift(op, y)
    if op.name == "shift_right_logical":
        bad = bad | (x.lo < 0)
    elif jnp.issubdtype(op.result.dtype, jnp.unsignedinteger):
        return None
    y = both(y, lambda a: xp.where(bad, xp.zeros_like(a), a))
    return unless(xp, bad, *_corners(xp, operator.rshift, x, y), op.result)
