"""Interval rules: what each JAX primitive does to a range of values.

A rule gets an `Interval` for each operand and returns one that holds every value
the primitive can take on them. The interval of a Boolean says whether it is
*definitely* (`lo`) and *possibly* (`hi`) true. A range that may hold NaN has NaN for
a bound, so that no comparison with it is decided. A primitive without a rule, or with
parameters that its rule does not know, is `unknown`: the whole range of its type.

Arrays have four leading axes (example, head, query, key) that broadcast, then the
axes of the value itself. They are numpy arrays where all is concrete, else JAX's.

To add a primitive, write one function under `@rule("its name")`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_LEAD = 4  # the axes example, head, query and key


class Interval(NamedTuple):
    """All values between two bounds; exactly one value where `lo is hi`."""

    lo: Any
    hi: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One primitive as applied in a jaxpr: its name, parameters and types."""

    name: str
    params: dict[str, Any]
    operands: tuple[Any, ...]
    result: Any

    def parameter(self, name: str) -> Any:
        """Returns a parameter; raises `Renamed` without it, so the result is unknown."""
        if name not in self.params:
            raise Renamed(name)
        return self.params[name]


class Renamed(Exception):
    """An error of a rule: this version of JAX has no parameter of the name it reads."""


def attribute(value, name: str) -> Any:
    """Returns a part of a parameter; raises `Renamed` without it."""
    if not hasattr(value, name):
        raise Renamed(name)
    return getattr(value, name)


Rule = Callable[..., Interval | None]
_RULES: dict[str, tuple[Rule, Callable[..., Any] | None]] = {}
_ELEMENTWISE: set[str] = set()


def rule(*names: str, point: Callable[..., Any] | None = None):
    """Registers the rule of a primitive, called as `rule(xp, op, *operands)`.

    Args:
        *names: The names of the primitives.
        point: Computes single integers or Booleans exactly, wrapping as XLA does.

    Returns:
        A decorator that registers a function and returns it unchanged.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, (function, point)))
        return function

    return register


def elementwise(*names: str, point: Callable[..., Any] | None = None):
    """Registers a `rule` of a primitive whose operands have one shape, or are scalars."""
    _ELEMENTWISE.update(names)
    return rule(*names, point=point)


def namespace(*arrays):
    """Returns `numpy` if every array is concrete, else `jax.numpy`."""
    concrete = all(isinstance(a, np.ndarray | np.generic) for a in arrays)
    return np if concrete else jnp


def point(array) -> Interval:
    """Returns the interval of a single value."""
    return Interval(array, array)


def typed(x: Interval, dtype) -> Interval:
    """Returns bounds in their type: NumPy answers some questions of int4 in int8."""
    return x if x.lo.dtype == x.hi.dtype == dtype else both(x, lambda a: a.astype(dtype))


def flushed(x: Interval) -> Interval:
    """Adds 0 to known ranges that end at a denormal number.

    Some processors read these as 0, and round to 0 what would be one: 1e-40 > 0 is False on
    a CPU, and True where XLA evaluates it at compile time. Traced bounds are compared as
    the numbers themselves are, by one processor.
    """
    if namespace(*x) is not np or not jnp.issubdtype(x.lo.dtype, jnp.floating):
        return x
    normal, zero = (x.lo.dtype.type(a) for a in (jnp.finfo(x.lo.dtype).tiny, 0))
    above, below = (x.lo > zero) & (x.lo < normal), (x.hi < zero) & (x.hi > -normal)
    if not (above.any() or below.any()):
        return x
    return Interval(np.where(above, zero, x.lo), np.where(below, zero, x.hi))


def extremes(dtype):
    """Returns the least and the greatest value of a type, infinities included."""
    if np.dtype(dtype) == np.bool_:
        return np.False_, np.True_
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return np.array(info.min, dtype)[()], np.array(info.max, dtype)[()]
    return np.array(-np.inf, dtype)[()], np.array(np.inf, dtype)[()]


def unknown(aval) -> Interval:
    """Returns the interval that holds every value of a type, NaN included."""
    shape = (1,) * _LEAD + aval.shape
    if not is_real(aval) or jnp.issubdtype(aval.dtype, jnp.floating):
        dtype = aval.dtype if is_real(aval) else np.float32
        # Two arrays, because `lo is hi` would mean a single value.
        return Interval(np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype))
    lo, hi = extremes(aval.dtype)
    return Interval(np.full(shape, lo), np.full(shape, hi))


def is_real(aval) -> bool:
    """Says whether the rules know this type: Boolean, integer or float."""
    dtype = getattr(aval, "dtype", np.dtype(object))
    kinds = jnp.floating, jnp.signedinteger, jnp.unsignedinteger, np.bool_
    return dtype.itemsize > 0 and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def has_rule(name: str) -> bool:
    """Says whether a primitive has a rule."""
    return name in _RULES


def apply(op: Operation, operands: list[Interval]) -> Interval:
    """Returns the values that a primitive can take on intervals."""
    if op.name not in _RULES or not all(map(is_real, (*op.operands, op.result))):
        return unknown(op.result)
    function, exact = _RULES[op.name]
    # A scalar operand gets as many axes as the others have, of length 1, at its end.
    if op.name in _ELEMENTWISE:
        rank = max(x.lo.ndim for x in operands)
        operands = [both(x, lambda a: _as_rank(a, rank)) for x in operands]
    xp = namespace(*(bound for x in operands for bound in x))
    # Only integers and Booleans: single floats need the rule, whose bounds allow rounding.
    discrete = not any(is_float(aval) for aval in (*op.operands, op.result))
    # Bounds may overflow or be NaN; the rules handle that.
    with np.errstate(all="ignore"):
        if exact and discrete and all(x.lo is x.hi for x in operands):
            return typed(point(exact(*(x.lo for x in operands))), op.result.dtype)
        try:
            result = function(xp, op, *operands)
        except Renamed:
            result = None
    return unknown(op.result) if result is None else flushed(typed(result, op.result.dtype))


def is_float(aval) -> bool:
    """Says whether a type is of floats."""
    return jnp.issubdtype(aval.dtype, jnp.floating)


def both(x: Interval, function) -> Interval:
    """Applies a non-decreasing function to both bounds; a single value stays single."""
    lo = function(x.lo)
    return Interval(lo, lo if x.lo is x.hi else function(x.hi))


def _as_rank(array, rank: int):
    """Appends axes of length 1, so that the leading axes stay in place."""
    return array.reshape(array.shape + (1,) * (rank - array.ndim))


def unless(xp, bad, lo, hi, aval) -> Interval:
    """Returns lo … hi, or all values of the type where the bounds are `bad`."""
    if xp is np and not np.any(bad):
        return Interval(lo, hi)
    least, most = (np.nan, np.nan) if is_float(aval) else extremes(aval.dtype)
    return Interval(xp.where(bad, least, lo), xp.where(bad, most, hi))
