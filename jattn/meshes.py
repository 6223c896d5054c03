"""Arrays that lie on several devices: what their types say, kept out of the mathematics.

JAX types an array by more than shape and dtype. On a mesh with explicit axes the type says
along which mesh axes the array is cut, and JAX refuses an operation whose result could
lie in two ways, such as `ids[b, t]` for ids cut along b. Inside `jax.shard_map` the type
says over which mesh axes the array's values differ, and JAX refuses to combine two that
differ over other axes. Where an array lies changes no number, so:

    `across`     runs a public function with explicit axes left to XLA, and gives its
                 results the sharding that the types of the inputs say
    `jaxpr_of`   traces a user's function of scalars into a jaxpr whose types say nothing
                 of devices, whatever the arrays that it captured say
"""

import contextlib
import contextvars
import functools
import inspect
from typing import Any

import jax
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    Literal,
    set_current_trace,
    take_current_trace,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh


def across(letters: str):
    """Makes a public function one of arrays on any mesh.

    `letters` names the axes of the results, the batch's by one "B": each lies as the axis
    of the same letter in `query` (BTNH) or `key` (BSKH) does. A letter that these do not
    have, or whose mesh axis another one has taken, is not cut. Results of one rank less
    were averaged over heads. Where the function returns several arrays, a space
    separates their letters; results that are no arrays stay as they are.
    """

    def decorate(function):
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def on_any_mesh(*args, **kwargs):
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = _explicit_mesh(leaves)
            if mesh is None:
                return function(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            axes = _axes(given.get("query"), given.get("key"))
            with use_abstract_mesh(_left_to_xla(mesh)), _called_from(mesh):
                args, kwargs = tree.unflatten(map(without_axes, leaves))
                results, tree = jax.tree.flatten(function(*args, **kwargs))
            words = letters.split() or [""] * len(results)
            return tree.unflatten(
                jax.sharding.reshard(x, NamedSharding(mesh, _spec(word, x, axes)))
                if isinstance(x, jax.Array)
                else x
                for word, x in zip(words, results, strict=True)
            )

        return on_any_mesh

    return decorate


_CALLER: contextvars.ContextVar = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def _called_from(mesh):
    """Keeps the mesh that a public function was called in."""
    token = _CALLER.set(mesh)
    try:
        yield
    finally:
        _CALLER.reset(token)


def without_axes(array):
    """The array with its explicit mesh axes left to XLA; what is none, as it is."""
    if isinstance(array, jax.ShapeDtypeStruct):
        mesh = getattr(array.sharding, "mesh", None)
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return array
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    mesh = _mesh_of(array)
    if mesh is None:
        return array
    mesh = _left_to_xla(mesh)
    uncut = PartitionSpec(*[None] * array.ndim)
    with use_abstract_mesh(mesh):
        return jax.sharding.reshard(array, NamedSharding(mesh, uncut))


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


def _explicit_mesh(leaves):
    """The mesh with explicit axes that a call is on, abstract; None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh if AxisType.Explicit in mesh.axis_types else None
    meshes = (_mesh_of(x) for x in leaves)
    return next((mesh for mesh in meshes if mesh is not None), None)


def _mesh_of(array):
    """The abstract mesh of an array, if it has explicit axes."""
    if not isinstance(array, jax.Array):
        return None
    mesh = jax.typeof(array).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _left_to_xla(mesh):
    """The abstract mesh with automatic axes in place of explicit ones."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def _axes(query, key) -> dict:
    """For each letter, the sizes of its axes and the mesh axes that they are cut along."""
    found = {}
    for array, names in ((key, "SN"), (query, "TN")):
        if _mesh_of(array) is None or array.ndim < 3:
            continue
        pairs = [*zip(array.shape, jax.typeof(array).sharding.spec, strict=True)]
        found |= {"B": pairs[:-3], names[0]: [pairs[-3]], names[1]: [pairs[-2]]}
    return found


def _spec(word: str, result, axes: dict):
    """How a result lies whose axes have these letters."""
    uncut = [(None, None)]
    if len(word) - 1 + len(axes.get("B", ())) > result.ndim:
        word = word.replace("N", "")
    pairs = [x for letter in word for x in axes.get(letter, uncut)]
    pairs = ([*uncut * result.ndim, *pairs])[-result.ndim :] if result.ndim else []
    spec, taken = [], set()
    for size, (want, names) in zip(result.shape, pairs, strict=True):
        own = {names} if isinstance(names, str) else set(names or ())
        free = size == want and not own & taken
        spec.append(names if free else None)
        taken |= own if free else set()
    return PartitionSpec(*spec)
