"""Frozen dataclasses that JAX sees as trees of arrays, and that compare by value."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import dataclass_transform

import jax
import numpy as np


@dataclass_transform(frozen_default=True)
def pytree(*leaves: str, static: tuple[str, ...] = ()):
    """Makes a frozen dataclass whose `leaves` JAX sees and whose `static` fields it hashes.

    An instance made from a tree is not checked again, for transformations put objects
    other than arrays into a tree, such as None, axes or shardings.

    Instances are values. Two instances of one class are equal, and have one hash, if all
    their fields are equal. Arrays are compared by shape, dtype and content, whether JAX's
    or NumPy's; traced arrays and functions by identity; a `functools.partial` by its
    function and all that it holds; all other fields by `==`. So instances can be static
    arguments of `jit` and keys of a dict. Hashing an instance reads all its arrays.
    """
    names = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(instance):
        children = tuple(getattr(instance, name) for name in leaves)
        rest = tuple(getattr(instance, name) for name in static)
        # JAX compares the rest in each call of a program, and tuples fastest.
        apart = any(isinstance(x, functools.partial) for x in rest)
        return children, _Static(rest) if apart else rest

    def flatten_with_keys(instance):
        children, rest = flatten(instance)
        return tuple(zip(names, children, strict=True)), rest

    def register(cls):
        # A class with a `__repr__`, its own or an inherited one as masks have, keeps it.
        own = cls.__repr__ is not object.__repr__
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=not own)(cls)

        def unflatten(rest, children):
            # Without `__init__`, whose checks would refuse None, axes and shardings.
            instance = object.__new__(cls)
            rest = rest.values if isinstance(rest, _Static) else rest
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
        value = value.item()
    # −0 is not 0, and equals itself, and so does a number that is none.
    if isinstance(value, float) and (value != value or str(value) == "-0.0"):
        return bits(value)
    if isinstance(value, np.ndarray | jax.Array):
        return by_content(value)
    if isinstance(value, list | tuple | dict):
        leaves, tree = jax.tree.flatten(value)
        return tree, tuple(map(_field, leaves))
    return by_parts(value, _held) if isinstance(value, functools.partial) else value


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """Static fields with a partial, compared in a tree's structure as in an instance."""

    values: tuple

    def __eq__(self, other):
        return isinstance(other, _Static) and self._keys() == other._keys()

    def __hash__(self):
        return hash(self._keys())

    def _keys(self) -> Hashable:
        return tuple(map(_field, self.values))


def by_parts(value, key) -> Hashable:
    """Makes a key of a value that a function holds; `key` makes the keys of its parts.

    Values with one key compute the same. So types count: 1, 1.0 and True are three.
    """
    if type(value) is functools.partial:  # a subclass may do something else
        return type(value), *map(key, (value.func, value.args, value.keywords))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(key, value))
    if isinstance(value, dict):
        return type(value), tuple((key(name), key(x)) for name, x in value.items())
    if isinstance(value, float | complex | np.ndarray | np.generic | jax.Array):
        return type(value), getattr(value, "weak_type", False), by_content(value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(key, value))
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return type(value), value


def _held(value) -> Hashable:
    return by_parts(value, _held)


def by_content(array) -> Hashable:
    """Makes a key of a number or an array; the key of a traced array equals only itself."""
    if isinstance(array, jax.core.Tracer):
        return Same(array)
    if jax.dtypes.issubdtype(getattr(array, "dtype", float), jax.dtypes.extended):
        return array.dtype, *bits(jax.random.key_data(array))
    return bits(array)


def bits(value, dtype=None) -> tuple[Hashable, ...]:
    """Gives the shape, the type and the bits of a number or an array."""
    array = np.asarray(value, dtype)
    return array.shape, array.dtype, array.tobytes()


# An array of up to so many numbers is written in full. For a longer array, which would
# fill the screen, only its type and shape are written.
_MOST_NUMBERS = 100


def as_written(instance) -> str:
    """Writes a dataclass as Python code: `Window(4, 0)`, `Segments([0, 0, 1])`.

    Fields with their default value are left out; the fields after such a field are named.
    """
    arguments, left_out = [], False
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if value is field.default or (type(value) is int and value == field.default):
            left_out = True
            continue
        text = _written(value)
        arguments.append(f"{field.name}={text}" if left_out else text)
    return f"{type(instance).__name__}({', '.join(arguments)})"


def _written(value) -> str:
    known = isinstance(value, jax.Array | np.ndarray) and not _is_traced(value)
    if known and value.size <= _MOST_NUMBERS and value.dtype.kind in "iufb":
        return repr(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return repr(value.item())
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return repr(value)


def _is_traced(value) -> bool:
    return isinstance(value, jax.core.Tracer)


class Same:
    """A key of an object by identity; it keeps the object alive, so that its id lasts."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)
