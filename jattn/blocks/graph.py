"""A jaxpr as a graph in which one-sided values are already computed.

Calls are inlined, and a `cond` becomes a selection. A value that depends on at most one
side of the attention matrix (the query or the key) is computed exactly, at every position
of that side. A value that depends on both sides is evaluated later, on blocks (see
`decide`).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.blocks import arithmetic as arithmetic  # registers its rules
from jattn.blocks import division as division  # likewise
from jattn.blocks import indexing as indexing  # likewise
from jattn.blocks import rearrange as rearrange  # likewise
from jattn.blocks import rules as rules  # likewise
from jattn.blocks.intervals import (
    Interval,
    Operation,
    apply,
    flushed,
    has_rule,
    is_real,
    point,
    unknown,
)
from jattn.call.jaxprs import CALLS, RULES, called, walk
from jattn.call.keys import structure

QUERY, KEY = 2, 3  # the axes of the two sides in BNTS

_LEAD = 4  # the axes B, N, T, S, which come before a value's own axes
_DIVISIONS = {"floor_divide": jnp.floor_divide, "remainder": jnp.remainder}
_FINITE, _PRODUCTS = {"tanh", "erf", "sign"}, {"mul", "div"}
_MAX_DEPTH = 150  # of nested operations on both sides, since Python's stack is finite
_MAX_SIZE = 2**24  # numbers in a one-sided value; larger values have intervals only


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value in the function.

    Attributes:
        operation: The `Operation` that computes it; None for an input.
        operands: The operands of the operation.
        sides: The sides, QUERY and KEY, that it depends on.
        dense: Its value at every position, an `Interval`; None if it depends on both sides.
        depth: The longest chain of operations below it without a dense value.
    """

    operation: Any
    operands: tuple["Node", ...]
    sides: frozenset[int]
    dense: Any
    depth: int = 0


def concrete(array):
    """Returns a numpy array, or the array itself if it is traced."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def constant(array) -> Node:
    """Returns the node of an array that the function holds."""
    if not is_real(array):
        return _unknown(array)
    array = concrete(array)
    value = flushed(point(array.reshape((1,) * _LEAD + array.shape)))
    return Node(None, (), frozenset(), value)


def trace(
    jaxpr,
    inputs: list[Node],
    consts: list[Node] | None = None,
    known: dict[Hashable, Node] | None = None,
) -> list[Node]:
    """Returns the outputs of a jaxpr, closed or with its constants given, as nodes.

    The same operation on the same nodes is one node, kept in `known`. So if many rules say
    t ≥ s, that is one atom, and the complement of the rules stays short.
    """
    known = {} if known is None else known
    if consts is None:
        consts = [constant(c) for c in getattr(jaxpr, "consts", ())]
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

    def literal(atom):
        value = np.asarray(atom.val, getattr(atom.aval, "dtype", None))
        if value.dtype.hasobject:  # its bytes would be pointers, no key
            return constant(value)
        key = value.dtype, value.shape, value.tobytes()
        return known.setdefault(key, constant(value))

    step = lambda equation, operands: _equation(equation, operands, known)
    return walk(jaxpr, consts, inputs, step, literal)


def _equation(eqn, operands: list[Node], known: dict[Hashable, Node]) -> list[Node]:
    name, results = eqn.primitive.name, [v.aval for v in eqn.outvars]
    avals = tuple(atom.aval for atom in eqn.invars)
    inner = called(eqn, CALLS | RULES)
    if inner is not None:
        # `//` and `%` of jnp are calls, but have rules of their own.
        if _is_division(eqn, avals):
            operation = Operation(eqn.params["name"], {}, avals, *results)
            return [_node(operation, operands, known)]
        return trace(inner[0], operands, list(map(constant, inner[1])), known=known)
    if name == "cond" and "branches" in eqn.params:
        return _cond(eqn, operands, avals[0], known)
    if not has_rule(name) and (folded := _folded(eqn, operands)):
        return folded
    if len(results) != 1:
        return [_unknown(aval) for aval in results]
    return [_node(Operation(name, eqn.params, avals, *results), operands, known)]


def _cond(eqn, operands: list[Node], which, known: dict[Hashable, Node]) -> list[Node]:
    """Evaluates all branches of a `cond`, which are pure; the predicate selects."""
    index, *rest = operands
    branches = [trace(branch, rest, known=known) for branch in eqn.params["branches"]]
    return [
        _node(
            Operation("select_n", {}, (which, *[v.aval] * len(cases)), v.aval),
            [index, *cases],
            known,
        )
        for v, *cases in zip(eqn.outvars, *branches, strict=True)
    ]


def _unknown(aval) -> Node:
    return Node(None, (), frozenset(), unknown(aval))


def _node(operation: Operation, operands: list[Node], known: dict[Hashable, Node]) -> Node:
    """Returns the node of an operation: the known one if there is one, else a new one."""
    params = tuple((x, type(y), y) for x, y in sorted(operation.params.items()))
    result = operation.result
    key = operation.name, tuple(operands), params, result.dtype, result.shape
    try:
        hash(key)
    except TypeError:  # a parameter that cannot be compared
        return _made(operation, operands)
    if key not in known:
        known[key] = _made(operation, operands)
    return known[key]


def _made(operation: Operation, operands: list[Node]) -> Node:
    sides = frozenset().union(*(x.sides for x in operands))
    values = [x.dense for x in operands]
    is_dense = len(sides) < 2 and None not in values
    if is_dense and size(values, operation.result) <= _MAX_SIZE:
        return Node(operation, tuple(operands), sides, apply(operation, values))
    depth = 1 + max((x.depth for x in operands), default=0)
    if depth > _MAX_DEPTH:
        return _unknown(operation.result)
    return Node(operation, tuple(operands), sides, None, depth)


def size(operands: list[Interval], result) -> int:
    """Returns how many numbers the result of an operation on intervals has."""
    lead = np.broadcast_shapes(*(x.lo.shape[:_LEAD] for x in operands))
    return math.prod(lead + result.shape)


@functools.cache
def _division(name: str, avals) -> Hashable:
    """Returns the structure of the jaxpr of an integer `//` or `%`."""
    operands = [
        jax.ShapeDtypeStruct((), aval.dtype, weak_type=aval.weak_type) for aval in avals
    ]
    (eqn,) = jax.make_jaxpr(_DIVISIONS[name])(*operands).eqns
    return structure(eqn.params["jaxpr"].jaxpr)


def _is_division(eqn, avals) -> bool:
    """Says whether a call is jnp's `//` or `%` of integers, by comparing jaxprs.

    Inside, they compare signs to round towards −∞, which intervals cannot follow.
    """
    name = eqn.params.get("name")
    if name not in _DIVISIONS or len(avals) != 2:
        return False
    if any(a.shape or not jnp.issubdtype(a.dtype, jnp.integer) for a in avals):
        return False
    return structure(eqn.params["jaxpr"].jaxpr) == _division(name, avals)


def _folded(eqn, operands: list[Node]) -> list[Node] | None:
    """Runs a primitive without a rule, such as a search, if it sees at most one side.

    Returns None if it cannot run.
    """
    values, results = [x.dense for x in operands], [v.aval for v in eqn.outvars]
    # Floats are not folded: in the call itself they may differ in the last place.
    floats = [not is_real(a) or jnp.issubdtype(a.dtype, jnp.floating) for a in results]
    sides = frozenset().union(*(x.sides for x in operands))
    single = all(x is not None and x.lo is x.hi for x in values)
    # The program may be lowered for another platform than the one that folds.
    if eqn.primitive.name == "platform_index":
        return None
    if eqn.effects or any(floats) or len(sides) > 1 or not single:
        return None
    if sum(size(values, aval) for aval in results) > _MAX_SIZE:
        return None
    arrays = [x.lo for x in values]
    known = all(isinstance(array, np.ndarray) for array in arrays)
    # Known arrays are computed at once, also inside `jit`.
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        outputs = _run(eqn, arrays)
    return [Node(None, (), sides, point(concrete(output))) for output in outputs]


def _run(eqn, arrays):
    """Runs a primitive at every point of the leading axes of its operands."""
    lead = np.broadcast_shapes(*(array.shape[:_LEAD] for array in arrays))
    axes, flat = [], []
    for array in arrays:
        shape = array.shape[_LEAD:]
        varies = array.shape[:_LEAD] != (1,) * _LEAD
        whole = jnp.broadcast_to(array, (lead if varies else (1,) * _LEAD) + shape)
        flat.append(whole.reshape((-1,) * varies + shape))
        axes.append(0 if varies else None)
    function = lambda *xs: eqn.primitive.bind(*xs, **eqn.params)
    varies = any(axis == 0 for axis in axes)
    outputs = (jax.vmap(function, tuple(axes)) if varies else function)(*flat)
    outputs = outputs if eqn.primitive.multiple_results else [outputs]
    return [
        x.reshape(lead + v.aval.shape) for x, v in zip(outputs, eqn.outvars, strict=True)
    ]
