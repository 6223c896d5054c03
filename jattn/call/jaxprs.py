"""Jaxprs: one list of the calls in them, and one walk over their equations."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

# The calls that are looked into, and the parameter that holds their jaxpr.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}
# Those of functions with their own derivatives, which are lost where one looks inside.
RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def called(equation, calls: dict[str, str] = CALLS) -> tuple[Any, Sequence] | None:
    """Gives the jaxpr that a call runs, and its constants; None for all else."""
    inner = equation.params.get(calls.get(equation.primitive.name))
    if inner is None:
        return None
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def walk(
    jaxpr, constants: Sequence, inputs: Sequence, step: Callable, literal: Callable
) -> list:
    """Gives the outputs of a jaxpr, whatever stands for its values.

    Args:
        jaxpr: Not closed.
        constants: What stands for its constants.
        inputs: What stands for its inputs.
        step: From an equation and its operands to a sequence of its results.
        literal: From a literal to what stands for it.
    """
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: literal(atom) if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
        results = step(equation, [read(x) for x in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]
