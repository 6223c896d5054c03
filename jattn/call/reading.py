"""A trace of a function that reads arrays with explicit mesh axes."""

import contextlib
import itertools

import jax
from jax.extend.core import set_current_trace, take_current_trace
from jax.sharding import use_abstract_mesh

from jattn.arrays.meshes import _CALLER, _mesh_of, without_axes


def is_of_meshes(error) -> bool:
    """Says whether an error may be JAX refusing explicit axes, not the user's own error.

    JAX has a class of errors for that, which it does not export. But inside a public
    function the explicit axes are left to XLA, so a captured array has another mesh than
    all other arrays. JAX refuses that with an error of a common class.
    """
    if type(error).__name__ == "ShardingTypeError":
        return True
    is_common = isinstance(error, TypeError | ValueError | NotImplementedError)
    return is_common and not jax.sharding.get_abstract_mesh().empty


def current_trace():
    """Gives the trace that primitives are bound in here."""
    with take_current_trace() as trace:
        return trace


def traced_reading(function, scalars):
    """Traces a function that cannot be traced directly because of explicit axes.

    Each array with explicit axes is replaced when a primitive reads it. A `jit` inside the
    function checks the types before any primitive reads them. So if the trace fails, it is
    repeated with `jit` disabled.

    The function runs with this call's mesh, on which what was replaced is. But inside
    `shard_map` a primitive checks the mesh before it calls its trace: then it runs with the
    caller's mesh, and `_Reading` restores its own.
    """
    outer = current_trace()
    own = jax.sharding.get_abstract_mesh()
    caller = own if _CALLER.get() is None else _CALLER.get()

    def trace(mesh, jits_are_off):
        def reading(*scalars):
            reads = _Reading(current_trace(), outer, own)
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
