"""A function of scalars as a jaxpr whose types say nothing of devices."""

import contextlib
import functools
import itertools
from typing import Any

import jax
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    Literal,
    set_current_trace,
    take_current_trace,
)
from jax.sharding import NamedSharding, use_abstract_mesh

from jattn.arrays.meshes import _CALLER, _mesh_of, without_axes
from jattn.call.jaxprs import CALLS, called, walk


def jaxpr_of(function, *scalars):
    """Gives the jaxpr of a function of scalars, the arrays it captured, and its result.

    The result is a shape and dtype. No type in the jaxpr says anything of devices, so calls
    whose arrays lie on different devices have one program. The captured arrays also have
    their explicit mesh axes left to XLA.
    """
    try:
        closed, result = jax.make_jaxpr(function, return_shape=True)(*scalars)
    except Exception as error:
        if not _is_of_meshes(error):
            raise
        closed, result = _traced_reading(function, scalars)
    if _has_inner_arrays(closed.jaxpr):
        closed = _open(closed, scalars)
    captured = [without_axes(x) for x in closed.consts]
    meshes = [jax.typeof(x).sharding.mesh for x in captured if isinstance(x, jax.Array)]
    has_mesh = not all(x.empty for x in (*meshes, jax.sharding.get_abstract_mesh()))
    jaxpr = _plain(closed.jaxpr) if has_mesh else closed.jaxpr
    return _without_arrays(jaxpr), captured, result


def _without_arrays(jaxpr):
    """Gives the jaxpr without the arrays that it captured, which jax 0.12 keeps in it.

    A program outlives its call. It would keep their memory, or the tracers of a trace.
    """
    replaced = getattr(jaxpr, "with_consts", None)
    return jaxpr if replaced is None else replaced([None] * len(jaxpr.consts))


_JITS = {name: CALLS[name] for name in ("jit", "pjit")}


def _has_inner_arrays(jaxpr) -> bool:
    """Says whether a `jit` inside it closes over arrays, which its key would hold."""
    inner = filter(None, (called(equation, _JITS) for equation in jaxpr.eqns))
    return any(consts or _has_inner_arrays(jaxpr) for jaxpr, consts in inner)


def _open(closed, scalars):
    """Gives the same jaxpr, which captures the arrays of its inner `jit`s itself.

    Then a new array is another operand, and not another program.
    """
    opened = functools.partial(_opened, closed.jaxpr, closed.consts)
    try:
        return jax.make_jaxpr(lambda *x: opened(x)[0])(*scalars)
    except Exception as error:
        if not _is_of_meshes(error):
            raise
        return closed  # arrays that a primitive may not read here stay where they are


def _opened(jaxpr, consts, inputs):
    """Evaluates a jaxpr, and what its inner `jit`s do, without these."""

    def step(equation, operands):
        if (inner := called(equation, _JITS)) is not None:
            return _opened(*inner, operands)
        primitive = equation.primitive
        results = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
        return results if primitive.multiple_results else [results]

    return walk(jaxpr, consts, inputs, step, lambda literal: literal.val)


# Equations that say where an array lies and compute nothing: their output is their input.
_PLACING = {"pvary", "pcast", "reshard", "sharding_constraint"}


def _plain(jaxpr):
    """Gives the same jaxpr with types that say nothing of devices."""
    names: dict[Any, Any] = {}

    def atom(x):
        if isinstance(x, Literal):
            return Literal(x.val, _plain_type(x.aval))
        return names.setdefault(x, type(x)(_plain_type(x.aval)))

    constvars, invars = ([*map(atom, x)] for x in (jaxpr.constvars, jaxpr.invars))
    equations = []
    for equation in jaxpr.eqns:
        inputs = [*map(atom, equation.invars)]
        if equation.primitive.name in _PLACING:
            names.update(zip(equation.outvars, inputs, strict=True))
            continue
        params = {name: _plain_param(x) for name, x in equation.params.items()}
        outputs = [*map(atom, equation.outvars)]
        equations.append(equation.replace(invars=inputs, outvars=outputs, params=params))
    # From jax 0.11 on, a jaxpr is closed or not depending on its constants.
    consts = {"consts": jaxpr.consts} if isinstance(jaxpr, ClosedJaxpr) else {}
    return jaxpr.replace(
        constvars=constvars,
        invars=invars,
        eqns=equations,
        outvars=[*map(atom, jaxpr.outvars)],
        **consts,
    )


def _plain_type(aval):
    if not isinstance(aval, jax.core.ShapedArray):
        return aval
    return jax.core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _plain_param(value):
    if isinstance(value, NamedSharding):
        return None
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_plain(value.jaxpr))
    if isinstance(value, Jaxpr):
        return _plain(value)
    if type(value) in (tuple, list):
        return type(value)(map(_plain_param, value))
    return value


def _is_of_meshes(error) -> bool:
    """Says whether an error may be JAX refusing explicit axes, not the user's own error.

    JAX has a class of errors for that, which it does not export. But inside a public
    function the explicit axes are left to XLA, so a captured array has another mesh than
    all other arrays. JAX refuses that with an error of a common class.
    """
    if type(error).__name__ == "ShardingTypeError":
        return True
    kinds = TypeError, ValueError, NotImplementedError
    return isinstance(error, kinds) and not jax.sharding.get_abstract_mesh().empty


def _traced_reading(function, scalars):
    """Traces a function that cannot be traced directly because of explicit axes.

    Each array with explicit axes is replaced when a primitive reads it. A `jit` inside the
    function checks the types before any primitive reads them. So if the trace fails, it is
    repeated with `jit` disabled.

    The function runs with this call's mesh, on which what was replaced is. But inside
    `shard_map` a primitive checks the mesh before it calls its trace: then it runs with the
    caller's mesh, and `_Reading` restores its own.
    """
    with take_current_trace() as outer:
        pass  # only to know the trace outside the function; `inner` below likewise
    own = jax.sharding.get_abstract_mesh()
    caller = own if _CALLER.get() is None else _CALLER.get()

    def trace(mesh, jits_are_off):
        def reading(*scalars):
            with take_current_trace() as inner:
                pass
            reads = _Reading(inner, outer, own)
            with set_current_trace(reads), use_abstract_mesh(mesh):
                return function(*scalars)

        with jax.disable_jit(jits_are_off):
            return jax.make_jaxpr(reading, return_shape=True)(*scalars)

    *ways, last = itertools.product(dict.fromkeys((own, caller)), (False, True))
    for way in ways:
        with contextlib.suppress(Exception):
            return trace(*way)
    return trace(*last)


class _Reading(jax.core.Trace):
    """A trace that passes everything on to the `inner` trace, except explicit axes.

    It replaces each array with explicit axes, once, by an array without explicit axes. The
    `outer` trace makes that array; of one that the function itself computed, `inner` does.
    """

    def __init__(self, inner, outer, mesh):
        super().__init__()
        self.inner, self.outer, self.mesh, self.replaced = inner, outer, mesh, {}

    def read(self, array):
        """Gives the array that is read in place of this one."""
        if _mesh_of(array) is None:
            return array
        if id(array) not in self.replaced:
            # A `jit` gives its results the caller's mesh, and no other trace may have them.
            own = getattr(array, "_trace", None) is self.inner
            with set_current_trace(self.inner if own else self.outer):
                # The array is kept too, so that no other array gets its id.
                self.replaced[id(array)] = array, without_axes(array)
        return self.replaced[id(array)][1]

    def stage_value(self, val):
        """Takes in a number of Python, as `jnp.where(condition, x, 0)` has one."""
        with set_current_trace(self.inner), use_abstract_mesh(self.mesh):
            return self.inner.stage_value(self.read(val))

    def process_primitive(self, primitive, arrays, params, /):
        """Runs a primitive on the replaced arrays."""
        with set_current_trace(self.inner), use_abstract_mesh(self.mesh):
            return primitive.bind(*map(self.read, arrays), **params)

    def process_custom_jvp_call(self, primitive, function, jvp, arrays, /, **options):
        """Runs a function that defines its own tangents on the replaced arrays."""
        arrays = [*map(self.read, arrays)]
        process = self.inner.process_custom_jvp_call
        with use_abstract_mesh(self.mesh):
            return process(primitive, function, jvp, arrays, **options)

    def process_custom_vjp_call(self, primitive, function, fwd, bwd, arrays, /, **options):
        """Runs a function that defines its own cotangents on the replaced arrays."""
        arrays = [*map(self.read, arrays)]
        process = self.inner.process_custom_vjp_call
        with use_abstract_mesh(self.mesh):
            return process(primitive, function, fwd, bwd, arrays, **options)
