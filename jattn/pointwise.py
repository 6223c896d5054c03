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
import numpy as np
from jax.experimental import checkify
from jax.extend.core import Literal

from jattn.meshes import jaxpr_of

INDICES = ("b", "n", "t", "s")


@dataclass_transform(frozen_default=True)
def pytree(*leaves: str, static: tuple[str, ...] = ()):
    """Makes a frozen dataclass whose `leaves` JAX sees and whose `static` fields it hashes.

    One made from a tree is not checked again: transformations put into a tree what is no
    array, such as None, axes or shardings.

    Instances are values. Two of one class are equal if all their fields are, and then have
    one hash: arrays by shape, dtype and content, whether JAX's or NumPy's; traced arrays
    and functions by identity; the rest by `==`. So they can be static arguments of `jit`
    and keys of a dict; to hash one reads all its arrays.
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

        for name, method in (("__eq__", _equal), ("__hash__", _hash)):
            if name not in vars(cls):
                setattr(cls, name, method)
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


def _equal(self, other):
    """Compares two instances field by field."""
    if type(self) is not type(other):
        return NotImplemented
    return self is other or _value(self) == _value(other)


def _hash(self):
    """Hashes what `_equal` compares."""
    return hash((type(self), _value(self)))


def _value(instance) -> Hashable:
    """Gives the fields of a dataclass as something that compares and hashes by value."""
    fields = [getattr(instance, field.name) for field in dataclasses.fields(instance)]
    return tuple(map(_field, fields))


def _field(value) -> Hashable:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        return _constant(value)
    if isinstance(value, list | tuple | dict):
        leaves, tree = jax.tree.flatten(value)
        return tree, tuple(map(_field, leaves))
    return value


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
    program = Program(jaxpr, _used(jaxpr), _structure(jaxpr))
    captured = tuple(map(jnp.asarray, captured))
    return program, Arrays(captured, tuple(aligned))


def _without_checks(function, scalars):
    """Gives the jaxpr of a function whose checks are made into results."""
    return jax.make_jaxpr(checkify.checkify(function))(*scalars).jaxpr


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


# How many derivatives of a function with its own rules a key tells apart. Some rules call
# their function again, `exp` is one such, so there is no last one.
_ORDERS = 4
_RULES = ("custom_jvp_call", "custom_vjp_call")


def _structure(jaxpr, orders: int = _ORDERS) -> Hashable:
    """Makes a key of a jaxpr: equal ones compute the same from equal inputs.

    Every key in this library is made of the following, so that two programs with one key
    are one program. Nothing is known by its printed text, for two numbers may print alike.

        type of a value     shape, dtype, weak type, sharding: the abstract value itself
        literal             its type and its bits
        array of an inner   its type and its bits; a traced one only equals itself
          jaxpr
        inner jaxpr         its own key
        parameter           number: type and bits; container: its items; else by `==`
        function with its   the keys of its jaxpr and of the jaxpr of its derivative, and
          own derivative    so on for `orders` derivatives

    Only a function without a jaxpr, such as a callback, is known by its identity.
    """
    numbers: dict[Any, int] = {}

    def atom(x):
        if isinstance(x, Literal):
            return "literal", x.aval, _bits(x.val, getattr(x.aval, "dtype", None))
        return numbers.setdefault(x, len(numbers)), x.aval

    def equation(eqn):
        params = eqn.params
        if eqn.primitive.name in _RULES:
            params = {"call": eqn.params["call_jaxpr"], "rule": _Rule(eqn)}
        return (
            eqn.primitive,
            tuple(map(atom, eqn.invars)),
            tuple((name, _parameter(params[name], orders)) for name in sorted(params)),
            tuple(map(atom, eqn.outvars)),
        )

    inputs = tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))
    return inputs, tuple(map(equation, jaxpr.eqns)), tuple(map(atom, jaxpr.outvars))


def _parameter(value, orders: int) -> Hashable:
    """Makes a key of an equation's parameter, as `_structure` says."""
    if isinstance(value, _Rule):
        return value.structure(orders - 1) if orders else None
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return _structure(value.jaxpr, orders), tuple(map(_constant, value.consts))
    if hasattr(value, "eqns"):
        return _structure(value, orders)
    if isinstance(value, tuple | list):
        return type(value), tuple(_parameter(x, orders) for x in value)
    if isinstance(value, dict):
        items = tuple((key, _parameter(x, orders)) for key, x in value.items())
        return type(value), items
    if isinstance(value, float | complex | np.ndarray | np.generic | jax.Array):
        return type(value), _constant(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def _constant(array) -> Hashable:
    """Makes a key of a number or an array; a traced one only equals itself."""
    if isinstance(array, jax.core.Tracer):
        return _Same(array)
    if jax.dtypes.issubdtype(getattr(array, "dtype", float), jax.dtypes.extended):
        return array.dtype, *_bits(jax.random.key_data(array))
    return _bits(array)


def _bits(value, dtype=None) -> tuple[Hashable, ...]:
    """Gives the shape, the type and the bits of a number or an array."""
    array = np.asarray(value, dtype)
    return array.shape, array.dtype, array.tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
    """The derivative that a function brings with it, as an equation calls it."""

    equation: Any

    def structure(self, orders: int) -> Hashable:
        """Makes a key of the derivative's jaxpr."""
        types = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in self.inputs]
        try:
            derivative = jax.make_jaxpr(self._derivative)(*types)
        except Exception:  # noqa: BLE001  whatever the user's rule raises; it may be unused
            return _Same(self.equation)
        constants = tuple(map(_constant, derivative.consts))
        return _structure(derivative.jaxpr, orders), constants

    @property
    def inputs(self):
        """The inputs of the call, then what is to be pushed or pulled through it."""
        real = lambda x: jnp.issubdtype(x.aval.dtype, jnp.inexact)
        forward = self.equation.primitive.name == "custom_jvp_call"
        ends = self.equation.invars if forward else self.equation.outvars
        return [*self.equation.invars, *filter(real, ends)]

    def _derivative(self, *arrays):
        """Pushes tangents through the call, or pulls cotangents."""
        primitive, count = self.equation.primitive, len(self.equation.invars)
        params = primitive.get_bind_params(self.equation.params)
        primals, rest = arrays[:count], arrays[count:]
        real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in primals]

        def call(*chosen):
            chosen = iter(chosen)
            given = [
                next(chosen) if flag else x for x, flag in zip(primals, real, strict=True)
            ]
            outputs = primitive.bind(*given, **params)
            return [x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)]

        chosen = tuple(x for x, flag in zip(primals, real, strict=True) if flag)
        if primitive.name == "custom_jvp_call":
            return jax.jvp(call, chosen, rest)[1]
        return jax.vjp(call, *chosen)[1](list(rest))


class _Same:
    """Equal to itself alone; keeps its object alive, so that identity lasts."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)
