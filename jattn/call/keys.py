"""Keys of traced functions: two functions with one key compute the same."""

import dataclasses
import types
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jattn.pytree import Same, bits, by_content, by_parts

# The number of derivatives, of a function with its own rules, that a key distinguishes.
# Some rules call their own function again, as a rule of `exp` does, so there is no last
# derivative. The rules of higher derivatives count as equal.
_ORDERS = 4
_RULES = ("custom_jvp_call", "custom_vjp_call")


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
        function without    its code, its defaults, and what it closes over
          a jaxpr

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
            params = {"call": eqn.params["call_jaxpr"], "rule": _Rule(eqn)}
        elif eqn.primitive.name == "custom_vmap_call":
            # JAX wraps the rule in a new object in each trace.
            params = params | {"rule": getattr(params["rule"], "rule", params["rule"])}
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
        return structure(value.jaxpr, orders), tuple(map(by_content, value.consts))
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
    held = value.__defaults__, value.__kwdefaults__, *map(_content, value.__closure__ or ())
    # Code and global variables by identity: equal codes may be of different modules.
    known = Same(value.__code__), Same(value.__globals__)
    return known, _parameter(held, orders)


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
