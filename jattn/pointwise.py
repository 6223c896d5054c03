"""A function of one query and one key, made into data.

Masks and modifiers are functions of scalars: example `b`, query head `n`, query
position `t`, key position `s`. `trace` turns one into a `Program`, which compares equal
to every other of the same structure, and the arrays it uses. So a new lambda over new
arrays, written the same way, is the same program: nothing is compiled again, and the
arrays are ordinary operands that can be traced, batched and differentiated.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jattn.meshes import jaxpr_of

INDICES = ("b", "n", "t", "s")


@dataclass_transform(frozen_default=True)
def pytree(*leaves: str, static: tuple[str, ...] = ()):
    """A frozen dataclass whose `leaves` JAX sees and whose `static` fields it hashes.

    One made from a tree is not checked again: transformations put into a tree what is no
    array, such as None, axes or shardings.
    """
    names = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(instance):
        children = tuple(getattr(instance, name) for name in leaves)
        return children, tuple(getattr(instance, name) for name in static)

    def flatten_with_keys(instance):
        children, rest = flatten(instance)
        return tuple(zip(names, children, strict=True)), rest

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)

        def unflatten(rest, children):
            instance = object.__new__(cls)
            for name, value in zip((*leaves, *static), (*children, *rest), strict=True):
                object.__setattr__(instance, name, value)
            return instance

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


class Index(NamedTuple):
    """Where a tile's pairs are: four integer arrays that broadcast to BNTS."""

    b: jax.Array
    n: jax.Array
    t: jax.Array
    s: jax.Array


class Arrays(NamedTuple):
    """What a program reads: arrays it captured, and arrays aligned with BNTS."""

    captured: tuple[jax.Array, ...] = ()
    aligned: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced pointwise function; equal to those of equal structure.

    Its jaxpr takes the captured arrays as constants and then, all scalars, the logit (for
    a modifier), b, n, t, s, and an element of each aligned array.
    """

    jaxpr: Any = dataclasses.field(compare=False, repr=False)
    used: tuple[bool, ...] = dataclasses.field(compare=False)
    structure: Hashable = dataclasses.field(repr=False)

    def __call__(self, arrays: Arrays, index: Index, logit=None) -> jax.Array:
        """Evaluates at every pair of a tile; four axes, 1 where nothing depends on it."""
        inputs = (*index, *arrays.aligned)
        inputs = inputs if logit is None else (logit, *inputs)

        def at(*scalars):
            (result,) = jax.core.eval_jaxpr(self.jaxpr, arrays.captured, *scalars)
            return result

        return over_axes(at, inputs, self.used)


def trace(where: str, function: Callable, aligned, logit=None):
    """The program of `function(*scalars)`, and the arrays that it reads.

    Raises a ValueError where the function does not return one scalar: a Boolean, or a
    floating number where it takes a logit, whose dtype is `logit`.
    """
    scalars = [jax.ShapeDtypeStruct((), jnp.int32)] * len(INDICES)
    scalars += [jax.ShapeDtypeStruct((), array.dtype) for array in aligned]
    if logit is not None:
        scalars = [jax.ShapeDtypeStruct((), logit), *scalars]
    try:
        jaxpr, captured, result = jaxpr_of(function, *scalars)
    except jax.errors.TracerArrayConversionError:
        raise ValueError(
            f"{where}: a function of positions must index JAX arrays, got a NumPy array "
            f"indexed by a traced position; wrap the array in `jnp.asarray`."
        ) from None
    want = jnp.bool_ if logit is None else jnp.floating
    fits = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
    if not (fits and jnp.issubdtype(result.dtype, want)):
        kind = "a Boolean" if logit is None else "a floating"
        got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", result)
        raise ValueError(
            f"{where}: the function must return {kind} scalar for one query and one key, "
            f"got {got}; write it for scalars b, n, t, s."
        )
    program = Program(jaxpr, _used(jaxpr), _structure(jaxpr))
    captured = tuple(map(jnp.asarray, captured))
    return program, Arrays(captured, tuple(aligned))


def over_axes(function, inputs, used):
    """Maps a function of scalars over arrays of four axes that broadcast.

    Inputs that are not `used` do not spread their axes over the result.
    """
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

    An axis that is 1 in every input is not mapped, so that what depends on t alone is
    computed T times and not T·S times.
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
    """Which inputs the result depends on."""
    live = set(map(id, jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        if any(id(var) in live for var in equation.outvars):
            live.update(map(id, equation.invars))
    return tuple(id(var) in live for var in jaxpr.invars)


def _structure(jaxpr) -> Hashable:
    """What a jaxpr computes, as nested tuples that compare by value."""
    numbers: dict[Any, int] = {}

    def atom(x):
        if isinstance(x, Literal):
            return "literal", str(x.aval), type(x.val), repr(x.val)
        return numbers.setdefault(x, len(numbers)), str(x.aval)

    def equation(eqn):
        params = tuple((name, _parameter(eqn.params[name])) for name in sorted(eqn.params))
        return (
            eqn.primitive,
            tuple(map(atom, eqn.invars)),
            params,
            tuple(map(atom, eqn.outvars)),
        )

    inputs = tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))
    return inputs, tuple(map(equation, jaxpr.eqns)), tuple(map(atom, jaxpr.outvars))


def _parameter(value) -> Hashable:
    """An equation's parameter by value where that can be had, else by identity."""
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return _structure(value.jaxpr), tuple(map(_Same, value.consts))
    if hasattr(value, "eqns"):
        return _structure(value)
    if isinstance(value, tuple | list):
        return tuple(map(_parameter, value))
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


class _Same:
    """Equal to itself alone; keeps its object alive, so that identity lasts."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)
