"""An operation as part of a compiled program: for one platform, one or many devices."""

import dataclasses
import functools
import math

import jax
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, use_abstract_mesh


def lower(context, *arrays, operation, platform=None):
    """Lowers an operation as the platform and the devices of the program ask for it."""
    module = context.module_context
    if platform is not None:  # of several that are lowered for, this rule is for one
        module = module.replace(platforms=(platform,))
    exported = platform == "cuda" and module.lowering_parameters.for_export
    # Of a module for several platforms, the context says which of them this is for.
    platform = platform or (context.platforms or module.platforms)[0]
    operation = operation.on("export" if exported else platform)
    spread = _is_spread(module.axis_context)
    fast = functools.partial(operation.fast, spread=spread)
    if operation.collective:  # what computes in it is bound, and so lowered by itself
        with use_abstract_mesh(context.avals_in[0].sharding.mesh):
            return mlir.lower_fun(fast, multiple_results=True)(context, *arrays)
    if not spread:
        module = module.replace(axis_context=_alone(module.axis_context))
    # Inside, shapes are all that matters: not how the arrays lie on a mesh.
    with use_abstract_mesh(_NOWHERE):
        plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    context = context.replace(avals_in=plain, module_context=module)
    with use_abstract_mesh(_NOWHERE):
        return mlir.lower_fun(fast, multiple_results=True)(context, *arrays)


# No mesh: an array that is made has the one at hand in its type, and an equation of a
# user's function that was traced on another mesh would refuse it.
_NOWHERE = AbstractMesh((), ())


def _alone(axes):
    """The context, saying that one device runs the program, for rules that ask who does."""
    if _is_manual(axes):
        return dataclasses.replace(axes, manual_axes=frozenset(axes.mesh.axis_names))
    return dataclasses.replace(
        axes, num_devices=1, device_assignment=tuple(jax.devices()[:1])
    )


def _is_spread(axes) -> bool:
    """Whether the compiled program runs on several devices that share its arrays."""
    if not _is_manual(axes):
        return (axes.num_devices or 1) > 1
    shape = dict(axes.mesh.shape)
    rest = [size for name, size in shape.items() if name not in axes.manual_axes]
    return math.prod(rest) > 1


def _is_manual(axes) -> bool:
    """Whether a context is one inside `shard_map`, of the two kinds that JAX has.

    JAX does not export their classes, and might add one. To take it for another would
    compile a wrong program, so it is refused by name.
    """
    kinds = {"SPMDAxisContext": True, "ShardingContext": False}
    name = type(axes).__name__
    if name not in kinds:
        raise TypeError(
            f"jattn lowers programs in the contexts {', '.join(kinds)} of JAX, got {name}; "
            f"this version of JAX is newer than jattn knows."
        )
    return kinds[name]
