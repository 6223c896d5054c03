"""Jaxprs: one list of the calls in jaxprs, and one walk over their equations."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

# The calls that may be inlined, and the parameter that holds their jaxpr.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}
# Calls of functions with their own derivatives. Inlining such a call would lose these.
RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def called(equation, calls: dict[str, str] = CALLS) -> tuple[Any, Sequence] | None:
    """Gives the jaxpr that a call runs, and its constants; None for other equations."""
    inner = equation.params.get(calls.get(equation.primitive.name))
    if inner is None:
        return None
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def walk(
    jaxpr, constants: Sequence, inputs: Sequence, step: Callable, literal: Callable
) -> list:
    """Evaluates a jaxpr with objects of any kind in place of its values.

    Args:
        jaxpr: A jaxpr, not closed.
        constants: The objects that stand for its constants.
        inputs: The objects that stand for its inputs.
        step: A function from an equation and its operands to a sequence of its results.
        literal: A function from a literal to the object that stands for it.

    Returns:
        The objects that stand for its outputs.
    """
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: literal(atom) if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
        results = step(equation, [read(x) for x in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]
