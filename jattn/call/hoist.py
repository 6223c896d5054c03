"""Parts of a pointwise function that depend on the query alone or on the key alone.

A program is evaluated for every pair of a query and a key, though many of its values
depend on one side only: `doc[t]`, `slope[n]`, `cos(0.1 * s)`. `split` evaluates these
outside, once for each query or each key, into arrays aligned with BNTS. It leaves a program
of the equations that join the two sides or read the logit:

    doc[t] == doc[s]             →  q == k             with q = doc[t] and k = doc[s]
    logit · cos(0.1 s) − |t − s| →  logit · k − |t − s|   with k = cos(0.1 s)

JAX computes the new arrays from the captured ones, so gradients flow through them. Cheap
values stay in the program: bare positions, and their sums and comparisons. A sum of two
values that read different axes stays too, because its array would be longer than both.

What follows from captured arrays alone, `jnp.exp(table)` or `table.astype("float32")`, is
computed once too. So the tiles add up the gradient of a table in float16 in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jattn.call.jaxprs import called, walk
from jattn.call.program import Arrays, Index, Program, over_axes, trace

# Primitives so cheap that they may as well be evaluated at each pair.
_CHEAP = {"abs", "max", "min", "neg", "sign", "add", "sub", "mul", "clamp", "select_n"}
_CHEAP |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor"}
_CHEAP |= {"convert_element_type", "stop_gradient"}


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value in the function: its type, the axes it reads, and whether it is costly."""

    aval: Any
    reads: frozenset[str]
    is_costly: bool = False
    is_input: bool = False  # an index, the logit, or an element of an aligned array
    is_fixed: bool = False  # a captured array, or what follows from such arrays alone

    @property
    def is_joint(self) -> bool:
        """Says whether it differs from query to query and from key to key."""
        return {"t", "s"} <= self.reads

    @property
    def is_hoisted(self) -> bool:
        """Says whether it is evaluated outside, if the program inside needs it."""
        # Random keys, for example, are neither numbers nor Booleans, and stay inside.
        number = any(
            jnp.issubdtype(self.aval.dtype, kind) for kind in (jnp.number, jnp.bool_)
        )
        if self.is_joint or self.is_input or self.aval.shape or not number:
            return False
        # A value that reads no index is the same for all pairs, so it is computed once.
        return self.is_costly or not self.reads


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """An equation on values; an operand may be a literal."""

    equation: Any
    operands: tuple
    results: tuple[_Value, ...]

    @property
    def is_fixed(self) -> bool:
        """Says whether its results follow from captured arrays alone."""
        return bool(self.results) and all(x.is_fixed for x in self.results)

    def run(self, values: dict) -> None:
        """Adds the results to the values."""
        arguments = [x.val if isinstance(x, Literal) else values[x] for x in self.operands]
        primitive = self.equation.primitive
        params = primitive.get_bind_params(self.equation.params)
        results = primitive.bind(*arguments, **params)
        results = results if primitive.multiple_results else [results]
        values.update(zip(self.results, results, strict=True))


def split(program: Program, arrays: Arrays, index: Index) -> tuple[Program, Arrays]:
    """Gives the program that joins queries with keys, and the arrays that it reads.

    The result is the same function: with the same index and logit, it gives the same
    values. Captured scalars become aligned arrays of one element. Other captured arrays
    stay captured if an equation that joins both sides indexes them. To find empty blocks,
    take the program before the split: bounds on positions say more than arrays of values.

    Args:
        program: The program of a mask or a modifier.
        arrays: The arrays that it reads; they may be traced.
        index: The index of the pairs, as in calls of the program.

    Returns:
        The program, and its arrays.
    """
    indexed = (*index, *arrays.aligned)
    # A modifier has one input more than a mask, the logit, which reads all axes.
    logits = ["bnts"] * (len(program.jaxpr.invars) - len(indexed))
    reads = [*logits, *(_letters(x.shape) for x in indexed)]
    captured, inputs, result, fixed, steps = _graph(program.jaxpr, reads)
    logits, inputs = inputs[: len(logits)], inputs[len(logits) :]
    inside, needed = _needed(steps, result)

    given = dict(zip(captured, arrays.captured, strict=True))
    # The new program's aligned arrays: the old ones that it still needs, and new ones.
    whole = dict(zip(inputs[4:], arrays.aligned, strict=True))
    whole = {value: array for value, array in whole.items() if value in needed}
    leading = dict(zip(inputs, indexed, strict=True))
    for step in fixed:
        step.run(given)
    for value in (*given, *(x for step in steps for x in step.results)):
        if value in needed and value.is_hoisted:
            whole[value] = _outside(value, steps, given, leading)

    def joint(*scalars):
        # The order of inputs that `Program` has: the logit, b, n, t, s, aligned elements.
        front = (*logits, *inputs[:4])
        values = given | dict(zip((*front, *whole), scalars, strict=True))
        for step in inside:
            step.run(values)
        return result.val if isinstance(result, Literal) else values[result]

    logit = logits[0].aval.dtype if logits else None
    return trace("split", joint, tuple(whole.values()), logit)


def joint_equations(program: Program, logit: bool) -> list:
    """Gives the equations that `split` leaves at most, for arrays of any shapes.

    `logit` says whether the program takes a logit.
    """
    # Positions may differ by example, and aligned arrays may have all four axes: that reads
    # most, so it leaves most inside.
    reads = [*["bnts"] * logit, "b", "n", "bt", "bs"]
    reads += ["bnts"] * (len(program.jaxpr.invars) - len(reads))
    _, _, result, _, steps = _graph(program.jaxpr, reads)
    return [step.equation for step in _needed(steps, result)[0]]


def _graph(jaxpr, reads):
    """Gives captured values, inputs that read these axes, the result, and the steps.

    Steps are in two lists: those that follow from captured arrays alone, and all others.
    """
    captured = [
        _Value(var.aval, frozenset(), bool(var.aval.shape), is_fixed=True)
        for var in jaxpr.constvars
    ]
    inputs = [
        _Value(var.aval, frozenset(letters), is_input=True)
        for var, letters in zip(jaxpr.invars, reads, strict=True)
    ]
    steps: list[_Step] = []
    (result,) = _walk(jaxpr, captured, inputs, steps)
    fixed, others = ([x for x in steps if x.is_fixed == kind] for kind in (True, False))
    return captured, inputs, result, fixed, others


def _letters(shape) -> str:
    sizes = zip("bnts", shape, strict=True)
    return "".join(x for x, size in sizes if not (isinstance(size, int) and size == 1))


def _walk(jaxpr, constants, inputs, steps: list[_Step]) -> list:
    """Appends the steps of a jaxpr to `steps`, and gives its results."""

    def step(equation, operands):
        own = [x for x in operands if isinstance(x, _Value)]
        inner = called(equation)
        # If all arguments of a call are joint, nothing inside it can be hoisted.
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
        # A sum that reads more axes than its costly part would be a longer array than it.
        is_costly = any(x.reads == reads for x in costly)
    else:
        is_costly = True
    is_fixed = bool(operands) and all(x.is_fixed for x in operands)
    return tuple(
        _Value(var.aval, reads, is_costly, is_fixed=is_fixed) for var in equation.outvars
    )


def _needed(steps: list[_Step], result) -> tuple[list[_Step], set]:
    """Gives the steps that stay, in order, and the values that they and the result need."""
    inside, needed = [], {result} if isinstance(result, _Value) else set()
    for step in reversed(steps):
        wanted = [x for x in step.results if x in needed]
        stays = not all(x.is_hoisted for x in wanted)
        if stays or step.equation.effects:  # `jax.debug.print` has no result
            inside.append(step)
            needed.update(x for x in step.operands if isinstance(x, _Value))
    return inside[::-1], needed


def _outside(value: _Value, steps: list[_Step], given: dict, leading: dict) -> jax.Array:
    """Evaluates a value at every index that it reads, as an array of four axes."""
    # The cone has the steps that the value depends on, the last one first.
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
