"""Keys of traced functions: two functions with one key compute the same."""

import dataclasses
import functools
import types
import weakref
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jattn.pytree import Same, bits, by_content, by_parts

# The number of derivatives, of a function with its own rules, that a key distinguishes.
# Some rules call their own function again, as a rule of `exp` does, so there is no last
# derivative. The rules of higher derivatives count as equal.
_ORDERS = 4
_RULES = ("custom_jvp_call", "custom_vjp_call")
# JAX keeps the jaxprs of jitted functions; so their keys are made once, for each `orders`.
_KNOWN: Any = weakref.WeakKeyDictionary()


def structure(jaxpr, orders: int = _ORDERS) -> Hashable:
    """Makes a key of a jaxpr: jaxprs with equal keys compute the same from equal inputs.

    Every key in this library is made of the following parts, so two programs with one key
    are one program. Printed text is no part of a key, for two numbers may print alike.

        type of a value     shape, dtype, weak type, sharding: the abstract value itself
        literal             its type and its bits
        array of an inner   its type and its bits; a traced array equals only itself
          jaxpr
        inner jaxpr         its own key
        parameter           number: type and bits; container: its items; else by `==`
        function with its   the keys of its jaxpr and of the jaxpr of its derivative, and
          own derivative    so on for `orders` derivatives
        function without    its code, its defaults, and what it closes over; if it is
          a jaxpr             traced later, as long as it holds the same
        callback            the same, but variables and objects count by identity

    What is left, such as an object with a method, is compared by its own `==`, which is
    identity for most objects.
    """
    # Variables are numbered by first use, so that their names do not matter.
    numbers: dict[Any, int] = {}

    def atom(x):
        if isinstance(x, Literal):
            return "literal", x.aval, bits(x.val, getattr(x.aval, "dtype", None))
        return numbers.setdefault(x, len(numbers)), x.aval

    def equation(eqn):
        params = eqn.params
        # The rules in the parameters are functions, made anew in each trace; so the key
        # has the jaxprs that they trace to.
        if eqn.primitive.name in _RULES:
            # JAX traces `bwd` again for each derivative, and all other rules once.
            late = getattr(params.get("bwd"), "f", None)
            late = None if late is None else _Late(late, orders, compares=False)
            rule = _Rule(eqn)
            params = {"call": eqn.params["call_jaxpr"], "rule": rule, "late": late}
        elif eqn.primitive.name == "custom_vmap_call":
            # JAX wraps the rule in a new object in each trace.
            rule = getattr(params["rule"], "rule", params["rule"])
            params = params | {"rule": _Late(rule, orders)}
        elif "callback" in params:
            given = params["callback"]
            called = _run_later(getattr(given, "callback_func", given))
            params = params | {"callback": (called, getattr(given, "in_tree", None))}
        return (
            eqn.primitive,
            tuple(map(atom, eqn.invars)),
            tuple((name, _parameter(params[name], orders)) for name in sorted(params)),
            tuple(map(atom, eqn.outvars)),
        )

    inputs = tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))
    return inputs, tuple(map(equation, jaxpr.eqns)), tuple(map(atom, jaxpr.outvars))


def _parameter(value, orders: int) -> Hashable:
    """Makes a key of an equation's parameter, as `structure` says."""
    if isinstance(value, _Rule):
        return value.structure(orders - 1) if orders else None
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        if value.consts:
            return structure(value.jaxpr, orders), tuple(map(by_content, value.consts))
        known = _KNOWN.setdefault(value, {})
        if orders not in known:
            known[orders] = structure(value.jaxpr, orders), ()
        return known[orders]
    if hasattr(value, "eqns"):
        return structure(value, orders)
    if isinstance(value, types.FunctionType):
        return _function(value, orders - 1) if orders else Same(value)
    return by_parts(value, lambda x: _parameter(x, orders))


def _function(value, orders: int) -> Hashable:
    """Makes a key of a function without a jaxpr.

    A function inside another one is a new object in each call, but of the same code. Two
    functions of the same code compute the same if they hold the same.
    """
    held = [_content(cell) for cell in value.__closure__ or ()]
    # A function with this rule, which may call it, is that rule and another function.
    held = [x.fun if getattr(x, "vmap_rule", None) is value else x for x in held]
    held = (value.__defaults__, value.__kwdefaults__, value.__dict__, *held)
    # Code and global variables by identity: equal codes may be of different modules.
    known = Same(value.__code__), Same(value.__globals__)
    return known, _parameter(held, orders)


class _Late:
    """A function that JAX traces again after its key was made.

    Until then, the variables that it closes over may have got other values, as that of a
    loop has. From then on it equals no other, since the program that has it does not do
    what its key says.
    """

    def __init__(self, function, orders: int, compares: bool = True):
        self.function, self.orders = function, orders
        self.held = self._holds()
        self.key = self.held if compares else None

    def __eq__(self, other):
        same = isinstance(other, _Late) and self.key == other.key
        return same and all(x.held == x._holds() for x in (self, other))

    def __hash__(self):
        return hash(self.key)

    def _holds(self) -> Hashable:
        return _parameter(self.function, self.orders)


# What cannot change while a program waits to run; methods compare their object by identity.
_FIXED = int, float, complex, str, bytes, type(None), np.generic, jax.tree_util.PyTreeDef
_FIXED += types.MethodType, types.BuiltinFunctionType


def _run_later(value) -> Hashable:
    """Makes a key of a callback, a function that Python runs while the program runs.

    It may read a variable that changes, or write one.
    """
    if type(value) is functools.partial:
        parts = value.func, *value.args, *value.keywords.items()
    elif isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        if (value.__module__ or "").startswith("jax."):  # these wrap, and change nothing
            held = [_content(cell) for cell in cells]
            held = [tuple(x.items()) if isinstance(x, dict) else x for x in held]
        else:
            held = [Same(cell) for cell in cells]
        code = Same(value.__code__), Same(value.__globals__)
        more = value.__kwdefaults__ or {}
        parts = *code, value.__defaults__, *more.items(), *held
    elif isinstance(value, tuple):
        parts = value
    elif isinstance(value, (*_FIXED, Same)):
        return value if isinstance(value, Same) else by_parts(value, Same)
    else:
        return Same(value)
    return type(value), tuple(map(_run_later, parts))


def _content(cell):
    """Gives what a cell of a closure holds; the cell itself if it is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
    """The derivative that a function itself defines, as an equation calls it."""

    equation: Any

    def structure(self, orders: int) -> Hashable:
        """Makes a key of the derivative's jaxpr."""
        types = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in self.inputs]
        try:
            derivative = jax.make_jaxpr(self._derivative)(*types)
        except Exception:  # noqa: BLE001  a user's rule may raise anything, and be unused
            return Same(self.equation)
        constants = tuple(map(by_content, derivative.consts))
        return structure(derivative.jaxpr, orders), constants

    @property
    def inputs(self):
        """Gives the inputs of the call, and after them tangents or cotangents."""
        real = lambda x: jnp.issubdtype(x.aval.dtype, jnp.inexact)
        forward = self.equation.primitive.name == "custom_jvp_call"
        # A jvp takes tangents of the inputs, a vjp cotangents of the outputs.
        ends = self.equation.invars if forward else self.equation.outvars
        return [*self.equation.invars, *filter(real, ends)]

    def _derivative(self, *arrays):
        """Pushes tangents through the call, or pulls cotangents back through it."""
        primitive, count = self.equation.primitive, len(self.equation.invars)
        params = primitive.get_bind_params(self.equation.params)
        primals, rest = arrays[:count], arrays[count:]
        real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in primals]

        def call(*chosen):
            chosen = iter(chosen)
            given = [
                next(chosen) if flag else x for x, flag in zip(primals, real, strict=True)
            ]
            outputs = primitive.bind(*given, **params)
            return [x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)]

        chosen = tuple(x for x, flag in zip(primals, real, strict=True) if flag)
        if primitive.name == "custom_jvp_call":
            return jax.jvp(call, chosen, rest)[1]
        return jax.vjp(call, *chosen)[1](list(rest))
