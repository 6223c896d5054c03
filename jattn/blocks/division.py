"""The rules of quotients, remainders and shifts: what they do to a range of values.

Both quotients are monotone in each operand while no divisor is zero. Quotients of floats
are widened a little, since compilers fuse and rearrange them.
"""

import operator

import jax.numpy as jnp
import numpy as np

from jattn.blocks.arithmetic import corners, holds_zero, outward
from jattn.blocks.intervals import (
    Interval,
    both,
    elementwise,
    extremes,
    is_float,
    point,
    unless,
)


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
    bad = holds_zero(y)
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
        return unless(xp, bad, *corners(xp, function, x, y), op.result)

    return apply_rule


@elementwise("div")
def _div(xp, op, x, y):
    if not is_float(op.result):
        return _quotient(_truncated)(xp, op, x, y)
    bounds = Interval(*corners(xp, operator.truediv, x, y))
    bad = holds_zero(y) | xp.isnan(bounds.lo) | xp.isnan(bounds.hi)
    return unless(xp, bad, *outward(xp, op.result, bounds, 2), op.result)


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


elementwise("floor_divide")(_quotient(operator.floordiv))
elementwise("rem")(_remainder(_truncated, _ends_of_rem))
elementwise("remainder")(_remainder(operator.floordiv, _ends_of_remainder))


def _is_shift(op, y):
    return (y.lo >= 0) & (y.hi < jnp.iinfo(op.result.dtype).bits)


@elementwise("shift_left")
def _shift_left(xp, op, x, y):
    bad = ~_is_shift(op, y)
    y = both(y, lambda a: xp.where(bad, xp.zeros_like(a), a))
    lo, hi = corners(xp, operator.lshift, x, y)
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
    return unless(xp, bad, *corners(xp, operator.rshift, x, y), op.result)
