"""An operation as part of a compiled program: for one platform, one or many devices."""

import dataclasses
import functools
import math

import jax
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, use_abstract_mesh


def lower(context, *arrays, operation, platform=None):
    """Lowers an operation for the platform and the devices of the program."""
    module = context.module_context
    if platform is not None:  # the rule of one platform, of perhaps several in a module
        module = module.replace(platforms=(platform,))
    exported = platform == "cuda" and module.lowering_parameters.for_export
    # A module may be for several platforms. The context says for which one this call is.
    platform = platform or (context.platforms or module.platforms)[0]
    operation = operation.on("export" if exported else platform)
    spread = _is_spread(module.axis_context)
    fast = functools.partial(operation.fast, spread=spread)
    if operation.collective:  # what computes in it is bound, and so lowered by itself
        with use_abstract_mesh(context.avals_in[0].sharding.mesh):
            return mlir.lower_fun(fast, multiple_results=True)(context, *arrays)
    if not spread:
        module = module.replace(axis_context=_alone(module.axis_context))
    # Inside, only shapes and dtypes matter, not how the arrays lie on a mesh.
    with use_abstract_mesh(_NOWHERE):
        plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
        context = context.replace(avals_in=plain, module_context=module)
        return mlir.lower_fun(fast, multiple_results=True)(context, *arrays)


# No mesh: an array that is made has the one at hand in its type, and an equation of a
# user's function that was traced on another mesh would refuse it.
_NOWHERE = AbstractMesh((), ())


def _alone(axes):
    """Gives the context of one device, for lowering rules that ask how many there are."""
    if _is_manual(axes):
        return dataclasses.replace(axes, manual_axes=frozenset(axes.mesh.axis_names))
    return dataclasses.replace(
        axes, num_devices=1, device_assignment=tuple(jax.devices()[:1])
    )


def _is_spread(axes) -> bool:
    """Says whether the program runs on several devices that share its arrays."""
    if not _is_manual(axes):
        return (axes.num_devices or 1) > 1
    # In `shard_map`, devices share arrays along the axes of the mesh that are not manual.
    shape = dict(axes.mesh.shape)
    rest = [size for name, size in shape.items() if name not in axes.manual_axes]
    return math.prod(rest) > 1


def _is_manual(axes) -> bool:
    """Says which of JAX's two kinds a context is: inside `shard_map` (True) or not.

    JAX does not export the two classes, and might add a third one. Treating the third as
    one of the two would compile a wrong program, so its name is refused.
    """
    kinds = {"SPMDAxisContext": True, "ShardingContext": False}
    name = type(axes).__name__
    if name not in kinds:
        raise TypeError(
            f"jattn lowers programs in the contexts {', '.join(kinds)} of JAX, got {name}; "
            f"this version of JAX is newer than jattn knows."
        )
    return kinds[name]
