"""A function of scalars as a jaxpr whose types say nothing of devices."""

import contextlib
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

from jattn.meshes import _CALLER, _mesh_of, without_axes


def jaxpr_of(function, *scalars):
    """The jaxpr of a function of scalars, the arrays it captured, and the result's shape.

    No type in it says anything of devices, so calls that differ only in where their arrays
    lie have one program; the arrays that it captured are left to XLA likewise.
    """
    try:
        closed, result = jax.make_jaxpr(function, return_shape=True)(*scalars)
    except Exception as error:
        if not _is_of_meshes(error):
            raise
        closed, result = _traced_reading(function, scalars)
    captured = [without_axes(x) for x in closed.consts]
    meshes = [jax.typeof(x).sharding.mesh for x in captured if isinstance(x, jax.Array)]
    if all(mesh.empty for mesh in (*meshes, jax.sharding.get_abstract_mesh())):
        return closed.jaxpr, captured, result
    return _plain(closed.jaxpr), captured, result


# Equations that say where an array lies and compute nothing.
_PLACING = {"pvary", "pcast", "reshard", "sharding_constraint"}


def _plain(jaxpr):
    """The same jaxpr over types that say nothing of devices."""
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
    # From jax 0.11 on, a jaxpr is closed or not by its constants.
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
    """Whether JAX may have refused explicit axes, and not what the function does.

    It has a class of errors for that, which it does not export. But inside a public
    function these axes are left to XLA, and an array that was captured is of another mesh
    than all others, which raises a common one.
    """
    if type(error).__name__ == "ShardingTypeError":
        return True
    kinds = TypeError, ValueError, NotImplementedError
    return isinstance(error, kinds) and not jax.sharding.get_abstract_mesh().empty


def _traced_reading(function, scalars):
    """The jaxpr of a function that explicit axes do not let trace as it stands.

    Each array with explicit axes is replaced as a primitive reads it. A `jit` inside the
    function looks at types before any primitive does; so if need be, it is left out.
    """
    with take_current_trace() as outer:
        pass
    own = jax.sharding.get_abstract_mesh()
    caller = own if _CALLER.get() is None else _CALLER.get()

    def reading(*scalars):
        with take_current_trace() as inner:
            pass
        # Inside `shard_map` a primitive looks at the mesh before its trace does.
        reads = _Reading(inner, outer, own)
        with set_current_trace(reads), use_abstract_mesh(caller):
            return function(*scalars)

    trace = jax.make_jaxpr(reading, return_shape=True)
    with contextlib.suppress(Exception):
        return trace(*scalars)
    with jax.disable_jit():
        return trace(*scalars)


class _Reading(jax.core.Trace):
    """Hands all on to the `inner` trace, but for arrays with explicit axes.

    They are replaced by what the `outer` trace makes of them, once each.
    """

    def __init__(self, inner, outer, mesh):
        super().__init__()
        self.inner, self.outer, self.mesh, self.replaced = inner, outer, mesh, {}

    def read(self, array):
        """The array that is read in place of one."""
        if _mesh_of(array) is None:
            return array
        if id(array) not in self.replaced:
            with set_current_trace(self.outer):
                self.replaced[id(array)] = array, without_axes(array)
        return self.replaced[id(array)][1]

    def process_primitive(self, primitive, arrays, params, /):
        """A primitive."""
        with set_current_trace(self.inner), use_abstract_mesh(self.mesh):
            return primitive.bind(*map(self.read, arrays), **params)

    def process_custom_jvp_call(self, primitive, function, jvp, arrays, /, **options):
        """A function that has its own tangents."""
        arrays = [*map(self.read, arrays)]
        process = self.inner.process_custom_jvp_call
        with use_abstract_mesh(self.mesh):
            return process(primitive, function, jvp, arrays, **options)

    def process_custom_vjp_call(self, primitive, function, fwd, bwd, arrays, /, **options):
        """A function that has its own cotangents."""
        arrays = [*map(self.read, arrays)]
        process = self.inner.process_custom_vjp_call
        with use_abstract_mesh(self.mesh):
            return process(primitive, function, fwd, bwd, arrays, **options)
