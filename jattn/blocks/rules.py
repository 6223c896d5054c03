"""Interval rules for comparisons, logic and selection.

A comparison with a bound of NaN is False. So each `possibly` bound is written as the
negation of a comparison: it is True wherever NaN leaves the answer open.
"""

import operator

import numpy as np

from jattn.blocks.intervals import (
    Interval,
    both,
    elementwise,
    point,
    unless,
)

# Logic and comparison.


@elementwise("lt", point=operator.lt)
def _lt(xp, op, x, y):
    return Interval(x.hi < y.lo, ~(x.lo >= y.hi))


@elementwise("le", point=operator.le)
def _le(xp, op, x, y):
    return Interval(x.hi <= y.lo, ~(x.lo > y.hi))


@elementwise("gt", point=operator.gt)
def _gt(xp, op, x, y):
    return _lt(xp, op, y, x)


@elementwise("ge", point=operator.ge)
def _ge(xp, op, x, y):
    return _le(xp, op, y, x)


@elementwise("eq", point=operator.eq)
def _eq(xp, op, x, y):
    possibly = ~((x.hi < y.lo) | (x.lo > y.hi))
    return Interval((x.lo >= y.hi) & (x.hi <= y.lo), possibly)


@elementwise("ne", point=operator.ne)
def _ne(xp, op, x, y):
    return _not(xp, op, _eq(xp, op, x, y))


@elementwise("not", point=operator.invert)
def _not(xp, op, x):
    return Interval(~x.hi, ~x.lo)  # decreasing for integers too: ~x = −x − 1


@elementwise("and", point=operator.and_)
def _and(xp, op, x, y):
    if op.result.dtype == bool:
        return Interval(x.lo & y.lo, x.hi & y.hi)
    # Of numbers ≥ 0, the bitwise `and` is at most each of them.
    hi = xp.minimum(x.hi, y.hi)
    negative = (x.lo < 0) | (y.lo < 0)
    return unless(xp, negative, xp.zeros_like(hi), hi, op.result)


@elementwise("or", point=operator.or_)
def _or(xp, op, x, y):
    return Interval(x.lo | y.lo, x.hi | y.hi) if op.result.dtype == bool else None


@elementwise("xor", point=operator.xor)
def _xor(xp, op, x, y):
    return _ne(xp, op, x, y) if op.result.dtype == bool else None


@elementwise("select_n")
def _select_n(xp, op, which, *cases):
    which = both(which, lambda a: a.astype(np.int32))
    which = both(which, lambda a: xp.clip(a, 0, len(cases) - 1))
    least, most = cases[0].lo, cases[0].hi
    for i, case in enumerate(cases[1:], 1):
        only, maybe = which.lo >= i, which.hi >= i
        # Where `only` is True, no earlier case is possible, and NaN in earlier cases must
        # not reach the result.
        low = xp.where(maybe, xp.minimum(least, case.lo), least)
        high = xp.where(maybe, xp.maximum(most, case.hi), most)
        least, most = xp.where(only, case.lo, low), xp.where(only, case.hi, high)
    exact = which.lo is which.hi and all(case.lo is case.hi for case in cases)
    return point(least) if exact else Interval(least, most)
