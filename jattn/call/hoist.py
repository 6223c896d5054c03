"""What of a pointwise function depends on the query alone or on the key alone.

A program is evaluated for every pair of a query and a key, though much of it looks at one
side only: `doc[t]`, `slope[n]`, `cos(0.1 * s)`. `split` evaluates that outside, once for
each query or each key, into arrays aligned with BNTS, and leaves a program of what joins
the two sides, or reads the logit:

    doc[t] == doc[s]             →  q == k             with q = doc[t] and k = doc[s]
    logit · cos(0.1 s) − |t − s| →  logit · k − |t − s|   with k = cos(0.1 s)

The arrays are ordinary JAX of the captured ones, so gradients flow through them. What
costs nothing at each pair stays: a bare position, and additions and comparisons of such.
So does a sum of two values that read different axes, for it would be longer than both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jattn.call.jaxprs import called, walk
from jattn.call.program import Arrays, Index, Program, over_axes, trace

# What may as well be done at each pair.
_CHEAP = {"abs", "max", "min", "neg", "sign", "add", "sub", "mul", "clamp", "select_n"}
_CHEAP |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor"}
_CHEAP |= {"convert_element_type", "stop_gradient"}


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value in the function: what type it has, which axes it reads, what it costs."""

    aval: Any
    reads: frozenset[str]
    is_costly: bool = False
    is_input: bool = False  # an index, the logit, or an element of an aligned array

    @property
    def is_joint(self) -> bool:
        """Whether it differs from query to query and from key to key."""
        return {"t", "s"} <= self.reads

    @property
    def is_hoisted(self) -> bool:
        """Whether it is evaluated outside, where it is needed inside."""
        number = any(
            jnp.issubdtype(self.aval.dtype, kind) for kind in (jnp.number, jnp.bool_)
        )
        if self.is_joint or self.is_input or self.aval.shape or not number:
            return False
        return self.is_costly or not self.reads


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """An equation on values; an operand may be a literal."""

    equation: Any
    operands: tuple
    results: tuple[_Value, ...]

    def run(self, values: dict) -> None:
        """Adds its results to the values."""
        arguments = [x.val if isinstance(x, Literal) else values[x] for x in self.operands]
        primitive = self.equation.primitive
        params = primitive.get_bind_params(self.equation.params)
        results = primitive.bind(*arguments, **params)
        results = results if primitive.multiple_results else [results]
        values.update(zip(self.results, results, strict=True))


def split(program: Program, arrays: Arrays, index: Index) -> tuple[Program, Arrays]:
    """The program of what joins queries with keys, and the arrays that it reads.

    The result is the same function: called with the same index and logit, it gives the
    same. Scalars that were captured become aligned arrays of one element; other arrays
    stay captured where what joins both sides indexes them. Which blocks are empty is
    best asked of the program before it is split, for that may know more of positions.

    Args:
        program: Of a mask or a modifier.
        arrays: What it reads; they may be traced.
        index: Where the pairs are, as the program is called with.

    Returns:
        The program, and its arrays.
    """
    indexed = (*index, *arrays.aligned)
    logits = ["bnts"] * (len(program.jaxpr.invars) - len(indexed))
    reads = [*logits, *(_letters(x.shape) for x in indexed)]
    captured, inputs, result, steps = _graph(program.jaxpr, reads)
    logits, inputs = inputs[: len(logits)], inputs[len(logits) :]
    inside, needed = _needed(steps, result)

    given = dict(zip(captured, arrays.captured, strict=True))
    whole = dict(zip(inputs[4:], arrays.aligned, strict=True))
    whole = {value: array for value, array in whole.items() if value in needed}
    leading = dict(zip(inputs, indexed, strict=True))
    for value in (*captured, *(x for step in steps for x in step.results)):
        if value in needed and value.is_hoisted:
            whole[value] = _outside(value, steps, given, leading)

    def joint(*scalars):
        front = (*logits, *inputs[:4])
        values = given | dict(zip((*front, *whole), scalars, strict=True))
        for step in inside:
            step.run(values)
        return result.val if isinstance(result, Literal) else values[result]

    logit = logits[0].aval.dtype if logits else None
    return trace("split", joint, tuple(whole.values()), logit)


def joint_equations(program: Program, logit: bool) -> list:
    """The equations that `split` leaves, whatever the shapes of the arrays; at the most.

    `logit` says whether the program takes one.
    """
    reads = [*["bnts"] * logit, "b", "n", "bt", "bs"]
    reads += ["bnts"] * (len(program.jaxpr.invars) - len(reads))
    *_, result, steps = _graph(program.jaxpr, reads)
    return [step.equation for step in _needed(steps, result)[0]]


def _graph(jaxpr, reads):
    """Captured values, inputs that read these axes, the result, and all steps."""
    captured = [_Value(x.aval, frozenset(), bool(x.aval.shape)) for x in jaxpr.constvars]
    inputs = [
        _Value(var.aval, frozenset(letters), is_input=True)
        for var, letters in zip(jaxpr.invars, reads, strict=True)
    ]
    steps: list[_Step] = []
    (result,) = _walk(jaxpr, captured, inputs, steps)
    return captured, inputs, result, steps


def _letters(shape) -> str:
    sizes = zip("bnts", shape, strict=True)
    return "".join(x for x, size in sizes if not (isinstance(size, int) and size == 1))


def _walk(jaxpr, constants, inputs, steps: list[_Step]) -> list:
    """Adds the steps of a jaxpr, and gives its results."""

    def step(equation, operands):
        own = [x for x in operands if isinstance(x, _Value)]
        inner = called(equation)
        # A call that is joint in all its arguments has nothing to take out.
        if inner is not None and not inner[1] and not all(x.is_joint for x in own):
            return _walk(inner[0], (), operands, steps)
        results = _results(equation, own)
        steps.append(_Step(equation, tuple(operands), results))
        return results

    return walk(jaxpr, constants, inputs, step, lambda literal: literal)


def _results(equation, operands: list[_Value]) -> tuple[_Value, ...]:
    reads = frozenset().union(*(x.reads for x in operands))
    avals = [x.aval for x in (*equation.invars, *equation.outvars)]
    costly = [x for x in operands if x.is_costly]
    if equation.primitive.name in _CHEAP and not any(aval.shape for aval in avals):
        # A sum over more axes than its costly part would be longer than that.
        is_costly = any(x.reads == reads for x in costly)
    else:
        is_costly = True
    return tuple(_Value(var.aval, reads, is_costly) for var in equation.outvars)


def _needed(steps: list[_Step], result) -> tuple[list[_Step], set]:
    """The steps that stay, in order, and the values that they and the result need."""
    inside, needed = [], {result} if isinstance(result, _Value) else set()
    for step in reversed(steps):
        wanted = [x for x in step.results if x in needed]
        if wanted and not all(x.is_hoisted for x in wanted):
            inside.append(step)
            needed.update(x for x in step.operands if isinstance(x, _Value))
    return inside[::-1], needed


def _outside(value: _Value, steps: list[_Step], given: dict, leading: dict) -> jax.Array:
    """A value at every index that it reads, as four axes."""
    cone, needed = [], {value}
    for step in reversed(steps):
        if any(x in needed for x in step.results):
            cone.append(step)
            needed.update(x for x in step.operands if isinstance(x, _Value))

    def at(*scalars):
        values = given | dict(zip(leading, scalars, strict=True))
        for step in reversed(cone):
            step.run(values)
        return jnp.asarray(values[value])

    return over_axes(at, list(leading.values()), [x in needed for x in leading])
