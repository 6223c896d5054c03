"""A function of scalars as a jaxpr whose types say nothing of devices."""

import contextlib
import functools
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, set_current_trace
from jax.extend.linear_util import wrap_init
from jax.sharding import NamedSharding, use_abstract_mesh

from jattn.arrays.meshes import varying, without_axes
from jattn.call.jaxprs import CALLS, called, walk
from jattn.call.reading import current_trace, is_of_meshes, traced_reading


def jaxpr_of(function, *scalars):
    """Gives the jaxpr of a function of scalars, the arrays it captured, and its result.

    The result is a shape and dtype. No type in the jaxpr says anything of devices, so calls
    whose arrays lie on different devices have one program. The captured arrays also have
    their explicit mesh axes left to XLA.
    """
    closed, result = _traced(function, scalars)
    if _has_inner_arrays(closed.jaxpr) or _asks_devices(closed.jaxpr):
        closed = _open(closed, scalars)
    captured = [without_axes(x) for x in closed.consts]
    meshes = [jax.typeof(x).sharding.mesh for x in captured if isinstance(x, jax.Array)]
    has_mesh = not all(x.empty for x in (*meshes, jax.sharding.get_abstract_mesh()))
    jaxpr = _plain(closed.jaxpr) if has_mesh else closed.jaxpr
    return _without_arrays(jaxpr), captured, result


def _traced(function, scalars):
    """Traces a function, on any mesh.

    Inside `jax.shard_map`, JAX says of each number whether it may differ from device to
    device. Scalars may not, unless JAX then refuses the function, as it refuses a
    `lax.cond` in which only one branch reads a number of one device; or unless derivatives
    are in it: JAX would add up over all devices what it differentiates by a scalar.
    """
    trace = lambda function: jax.make_jaxpr(function, return_shape=True)(*scalars)
    found, axes = None, frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    try:
        found = trace(function)
        axes = _axes_inside(found[0].jaxpr) if _has_derivatives(found[0].jaxpr) else ()
    except Exception as error:
        if not is_of_meshes(error):
            raise
    if axes:
        with contextlib.suppress(Exception):
            return trace(lambda *scalars: function(*varying(scalars, axes)))
    return found or traced_reading(function, scalars)


def _axes_inside(jaxpr) -> frozenset[str]:
    """Gives the axes of `jax.shard_map` along which any number of a jaxpr differs."""
    found = (x for equation in jaxpr.eqns for x in equation.outvars)
    types = (x.aval for x in (*jaxpr.constvars, *found))
    return frozenset().union(
        *(x.manual_axis_type.varying for x in types if hasattr(x, "manual_axis_type"))
    )


def _has_derivatives(jaxpr) -> bool:
    """Says whether it may have taken derivatives, or has functions with their own."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    own = any(name.startswith("custom_") or name == "call_hi_primitive" for name in names)
    params = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    inner = [x for x in (getattr(x, "jaxpr", x) for x in params) if hasattr(x, "eqns")]
    return own or _asks_devices(jaxpr) or any(map(_has_derivatives, inner))


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


def _asks_devices(jaxpr) -> bool:
    """Says whether it has a `lax.axis_index`, or sums something up over devices."""
    return any(type(x).__name__ == "NamedAxisEffect" for x in jaxpr.effects)


def _open(closed, scalars):
    """Gives the same jaxpr, which captures the arrays of its inner `jit`s itself.

    Then a new array is another operand, and not another program. What the function asks
    the devices for, such as `lax.axis_index`, is computed outside of it and captured too.
    """
    outer = current_trace() if _asks_devices(closed.jaxpr) else None
    opened = functools.partial(_opened, outer, closed.jaxpr, closed.consts)
    try:
        return jax.make_jaxpr(lambda *x: opened(x)[0])(*scalars)
    except Exception as error:
        if not is_of_meshes(error):
            raise
        return closed  # arrays that a primitive may not read here stay where they are


def _opened(outer, jaxpr, consts, inputs):
    """Evaluates a jaxpr, and what its inner `jit`s do, without these.

    If there is an `outer` trace, it computes everything that depends on no scalar.
    """
    own = current_trace()

    def step(equation, operands):
        if (inner := called(equation, _JITS)) is not None:
            return _opened(outer, *inner, operands)
        primitive = equation.primitive
        of_scalars = any(getattr(x, "_trace", None) is own for x in operands)
        with set_current_trace(own if outer is None or of_scalars else outer):
            params = primitive.get_bind_params(equation.params)
            results = primitive.bind(*operands, **params)
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
        for name in _RULES.keys() & params.keys():
            params[name] = _RULES[name](params[name])
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


def _plain_rule(rule):
    """Gives the same rule of a derivative, whose jaxpr says nothing of devices.

    JAX traces the rule when the derivative is taken, and with the types that it kept. So
    that is done on the mesh that these types are of.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def traced(*zeros):
        with use_abstract_mesh(mesh):
            jaxpr, *rest = rule.call_wrapped(*zeros)
        return _plain(jaxpr), *rest

    return wrap_init(traced, debug_info=rule.debug_info)


def _plain_backward(rule):
    """Gives the same rule for cotangents, which JAX compares with the types it kept."""
    plain = wrap_init(rule.f, dict(rule.params), debug_info=rule.debug_info)
    steps = zip(rule.transforms, rule.stores, strict=True)
    for (step, kept), store in reversed([*steps]):
        plain = plain.wrap(step, tuple(map(_plain_param, kept)), store)
    return plain


# The rules of a function with its own derivatives, by their names in its equation.
_RULES = {
    "jvp_jaxpr_fun": _plain_rule,
    "fwd_jaxpr_thunk": _plain_rule,
    "bwd": _plain_backward,
}


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
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain_param, value))
    if type(value) in (tuple, list):
        return type(value)(map(_plain_param, value))
    return _plain_type(value)
