"""A function of one query and one key, made into data.

Masks and modifiers are functions of scalars: example `b`, query head `n`, query
position `t`, key position `s`. `trace` turns such a function into a `Program` and the
arrays that it reads. Programs of the same structure are equal. So a new lambda over new
arrays, written the same way, is the same program: nothing is compiled again, and the
arrays are ordinary operands that can be traced, batched and differentiated.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from jattn.call.concrete import asks_for_a_number, number_refused
from jattn.call.keys import structure
from jattn.call.plain import jaxpr_of

INDICES = ("b", "n", "t", "s")


class Index(NamedTuple):
    """The indices of a tile's pairs: four integer arrays that broadcast to BNTS."""

    b: jax.Array
    n: jax.Array
    t: jax.Array
    s: jax.Array


class Arrays(NamedTuple):
    """The arrays that a program reads: captured ones, and ones aligned with BNTS."""

    captured: tuple[jax.Array, ...] = ()
    aligned: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced pointwise function; programs of equal structure are equal.

    The constants of its jaxpr are the captured arrays. Its inputs are scalars: the logit
    (of a modifier only), b, n, t, s, and an element of each aligned array.
    """

    jaxpr: Any = dataclasses.field(compare=False, repr=False)
    used: tuple[bool, ...] = dataclasses.field(compare=False)
    structure: Hashable = dataclasses.field(repr=False)

    def __call__(self, arrays: Arrays, index: Index, logit=None) -> jax.Array:
        """Evaluates all pairs of a tile, as four axes; an unused axis has length 1."""
        inputs = (*index, *arrays.aligned)
        inputs = inputs if logit is None else (logit, *inputs)

        def at(*scalars):
            (result,) = jax.core.eval_jaxpr(self.jaxpr, arrays.captured, *scalars)
            # A constant result, as of `lambda …: True`, is a number of Python.
            return jnp.asarray(result, self.jaxpr.outvars[0].aval.dtype)

        return over_axes(at, inputs, self.used)


def trace(where: str, function: Callable, aligned, logit=None):
    """Makes the program of `function(*scalars)`, and gives the arrays that it reads.

    Raises a ValueError unless the function returns one scalar: a Boolean, or a floating
    number if it takes a logit, whose dtype is `logit`.
    """
    # The order of inputs: the logit if there is one, b, n, t, s, aligned elements.
    scalars = [jax.ShapeDtypeStruct((), jnp.int32)] * len(INDICES)
    scalars += [jax.ShapeDtypeStruct((), array.dtype) for array in aligned]
    if logit is not None:
        scalars = [jax.ShapeDtypeStruct((), logit), *scalars]
    try:
        jaxpr, captured, result = jaxpr_of(function, *scalars)
    except (TypeError, IndexError) as error:
        if not asks_for_a_number(error):
            raise
        raise ValueError(f"{where}: {number_refused(error)}") from error
    # `checkify` turns its checks into results, so fewer effects are left if there are any.
    effects = jaxpr.effects
    if effects and len(_without_checks(function, scalars).effects) < len(effects):
        raise ValueError(
            f"{where}: a function of positions must be pure, got one with a "
            f"`checkify.check`, which blocks that are skipped would not run; check the "
            f"arrays that it reads before the call."
        )
    want = jnp.bool_ if logit is None else jnp.floating
    fits = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
    if not (fits and jnp.issubdtype(result.dtype, want)):
        kind = "a Boolean" if logit is None else "a floating"
        got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", result)
        raise ValueError(
            f"{where}: the function must return {kind} scalar for one query and one key, "
            f"got {got}; write it for scalars b, n, t, s."
        )
    program = Program(jaxpr, _used(jaxpr), structure(jaxpr))
    captured = tuple(map(jnp.asarray, captured))
    return program, Arrays(captured, tuple(aligned))


def _without_checks(function, scalars):
    """Gives the jaxpr of a function in which `checkify` turned checks into results."""
    return jax.make_jaxpr(checkify.checkify(function))(*scalars).jaxpr


def over_axes(function, inputs, used):
    """Maps a function of scalars over arrays of four axes that broadcast.

    An input that is not `used` does not add its axes to the result.
    """
    # An unused input becomes one element of it, or a zero where it is empty.
    inputs = [
        x
        if flag
        else x[:1, :1, :1, :1].reshape(1, 1, 1, 1)
        if x.size
        else jnp.zeros((1, 1, 1, 1), x.dtype)
        for x, flag in zip(inputs, used, strict=True)
    ]
    return _over_axes(function, inputs)


def _over_axes(function, inputs):
    """Maps axis by axis.

    An input whose axis is 1 is not mapped along it. So a value that depends on t alone is
    computed T times, not T·S times.
    """
    if not inputs or inputs[0].ndim == 0:
        return function(*inputs)
    axes = [None if x.shape[0] == 1 else 0 for x in inputs]
    inputs = [x[0] if axis is None else x for x, axis in zip(inputs, axes, strict=True)]
    if all(axis is None for axis in axes):
        return _over_axes(function, inputs)[None]

    # vmap counts an unmapped input's axes from its own rank, as _over_axes does.
    return jax.vmap(lambda *xs: _over_axes(function, list(xs)), in_axes=axes)(*inputs)


def _used(jaxpr) -> tuple[bool, ...]:
    """Says for each input whether the result, or an effect, depends on it."""
    # Backward from the outputs; by identity, for literals may not be hashable.
    live = set(map(id, jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(var) in live for var in equation.outvars):
            live.update(map(id, equation.invars))
    return tuple(id(var) in live for var in jaxpr.invars)
