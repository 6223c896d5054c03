"""The rules by which JAX runs, differentiates, maps and lowers an operation."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.core.primitives import cond_p, remat_p
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from jattn.operations.derivatives import Pullback
from jattn.operations.lowering import lower
from jattn.operations.mapped import Mapped, pushed
from jattn.operations.operation import choose, primitive


@functools.partial(jax.jit, static_argnums=0)
def _compiled(operation, *arrays):
    return operation(*arrays)


@primitive.def_impl
def _run(*arrays, operation):
    # This function binds the primitive again, inside `jit`. With `disable_jit`, or where
    # JAX runs a function without `jit` to find a NaN or Inf, it would call itself for ever.
    # NaN and Inf are still found, by the operations that read the results.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _compiled(operation, *arrays)


@primitive.def_abstract_eval
def _abstract(*types, operation):
    return operation.types(*types)


def _jvp(primals, tangents, *, operation):
    outputs = operation(*primals)
    if operation.names:
        outputs = tuple(map(checkpoint_name, outputs, operation.names))
    active = tuple(type(tangent) is not ad.Zero for tangent in tangents)
    if not any(active):
        return outputs, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in outputs]
    fixed = len(primals) - operation.linear
    # All tangents, also of the linear arguments, are computed in one pass.
    if any(active[:fixed]):
        kept = outputs if operation.names else ()
        tangents = choose(active, tangents)
        return outputs, list(pushed(operation, active)(*primals, *kept, *tangents))
    # f is linear in the rest, so its derivative is f itself, at the tangents.
    rest = map(ad.instantiate_zeros, tangents[fixed:])
    return outputs, list(operation(*primals[:fixed], *rest))


def _transpose(cotangents, *arrays, operation):
    fixed = len(arrays) - operation.linear
    cotangents = map(ad.instantiate_zeros, cotangents)
    unknown = tuple(map(ad.is_undefined_primal, arrays[:fixed]))
    if any(unknown):
        return _transpose_in(unknown, cotangents, arrays, operation)
    results = operation.transposed()(*arrays[:fixed], *cotangents)
    wanted = map(ad.is_undefined_primal, arrays[fixed:])
    results = [x if want else None for x, want in zip(results, wanted, strict=True)]
    return [None] * fixed + results


def _transpose_in(unknown, cotangents, arrays, operation):
    """Transposes an operation in some of its arguments `linear_in`, such as the values."""
    if not {i for i, flag in enumerate(unknown) if flag} <= operation.linear_in:
        raise ValueError(
            "jattn: `jax.linear_transpose` must be asked in the values alone, for "
            "attention is linear in nothing else; use `jax.vjp`."
        )
    # The derivative of a linear function is the same at all points, so also at 0.
    arrays = [_zeros(x) if ad.is_undefined_primal(x) else x for x in arrays]
    kept = operation(*arrays) if operation.names else ()
    results = iter(Pullback(operation, unknown)(*arrays, *kept, *cotangents))
    return [next(results) if flag else None for flag in unknown]


def _zeros(unknown):
    return ad.instantiate_zeros(ad.Zero(unknown.aval))


def _partial_eval(trace, *tracers, operation):
    """Runs an operation of which some arguments are unknown, as in `linear_transpose`.

    Outputs that do not depend on the unknown arguments, such as the logsumexp of an
    attention whose values are unknown, are computed now. So what is made of them, the
    share of a sink or of a merged part, is a number and not one more unknown.
    """
    outputs = trace.default_process_primitive(primitive, tracers, {"operation": operation})
    unknown = {i for i, x in enumerate(tracers) if not x.is_known()}
    if not operation.constant or not unknown or not unknown <= operation.linear_in:
        return outputs
    arrays = [x.pval.get_known() if x.is_known() else _zeros(x) for x in tracers]
    known = operation(*arrays)
    return [known[i] if i in operation.constant else x for i, x in enumerate(outputs)]


def _batch(arrays, axes, *, operation):
    mapped = tuple(axis is not None for axis in axes)
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    size = choose(mapped, moved)[0].shape[0]
    each = Mapped(operation, size, mapped, (False,) * operation.outputs)
    types = list(map(jax.typeof, moved))
    specs = [x.sharding.spec for x in choose(mapped, types)]
    # In a joined axis the mapped axis comes before the batch, which then could not stay
    # divided among devices.
    divided = any(len(spec) > 1 and spec[1] is not None for spec in specs)
    joined = None if divided else operation.joined(size, mapped, (False,) * len(mapped))
    outputs = each(*moved) if joined is None else joined(moved, mapped, each.types(*types))
    return outputs, [0] * len(outputs)


def _jet(primals, series, *, operation):
    """Computes the coefficients of a Taylor series, from derivatives along a path.

    path(time) = f(x + time · x₁ + time² · x₂ + …)        coefficient k: path⁽ᵏ⁾(0) / k!
    """

    def path(time):
        return operation(*map(functools.partial(_moved, time), primals, series))

    start = jnp.zeros(())
    outputs, terms = path(start), []
    for order, _ in enumerate(series[0], 1):
        path = functools.partial(_slope, path)
        terms.append([x / math.factorial(order) for x in path(start)])
    return outputs, list(zip(*terms, strict=True))


def _moved(time, primal, series):
    if not jnp.issubdtype(primal.dtype, jnp.floating):
        return primal
    total = jnp.zeros_like(primal)
    for term in reversed(series):
        total = time.astype(primal.dtype) * (term + total)
    return primal + total


def _slope(path, time):
    return jax.jvp(path, (time,), (jnp.ones_like(time),))[1]


def _jet_of_cond(primals, series, *, branches, **params):
    """Computes the coefficients of the branch that runs."""
    del params  # they say nothing of what is computed
    which, *operands = primals
    of = lambda branch: lambda *xs: _jet_of_jaxpr(branch, *xs)
    return jax.lax.switch(which, list(map(of, branches)), operands, series[1:])


def _jet_of_remat(primals, series, *, jaxpr, **params):
    """Computes the coefficients of what a gradient would compute again."""
    del params
    return _jet_of_jaxpr(ClosedJaxpr(jaxpr, ()), primals, series)


def _jet_of_jaxpr(jaxpr, primals, series):
    # Under strict promotion JAX takes no series of integers and Booleans; theirs are 0.
    real = [jnp.issubdtype(x.dtype, jnp.floating) for x in primals]

    def at(*moving):
        moving = iter(moving)
        given = [
            next(moving) if is_real else x for x, is_real in zip(primals, real, strict=True)
        ]
        return jaxpr_as_fun(jaxpr)(*given)

    return jet.jet(at, choose(real, primals), choose(real, series))


ad.primitive_jvps[primitive] = _jvp
ad.primitive_transposes[primitive] = _transpose
batching.primitive_batchers[primitive] = _batch
pe.custom_partial_eval_rules[primitive] = _partial_eval
jet.jet_rules[primitive] = _jet
# JAX has no rules for these (0.10 to 0.12).
jet.jet_rules.setdefault(cond_p, _jet_of_cond)
jet.jet_rules.setdefault(remat_p, _jet_of_remat)
mlir.register_lowering(primitive, lower)
for _platform in ("tpu", "cuda"):
    _rule = functools.partial(lower, platform=_platform)
    mlir.register_lowering(primitive, _rule, platform=_platform)
