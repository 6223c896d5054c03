"""How arrays of a mapped axis join one call of an operation."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jattn.operations.operation import Operation
from jattn.shapes import is_one


@dataclasses.dataclass(frozen=True)
class Kept:
    """An argument that is the same for every slice, and stays as it is."""

    def join(self, array, is_mapped: bool):
        """The array itself, which is not mapped."""
        del is_mapped
        return array


@dataclasses.dataclass(frozen=True)
class Leading:
    """An array whose first axis, of `length`, a mapped axis of `size` can join.

    The first axis may be 1 where it stands for all. Such an array stays as it is unless it
    is mapped, or must be given to each slice `apart`.
    """

    size: Any
    length: Any
    apart: bool

    def join(self, array, is_mapped: bool):
        """The array, its mapped axis first, with one axis for both."""
        if not is_mapped:
            if not self.apart and is_one(array.shape[0]):
                return array
            array = jnp.broadcast_to(array, (self.size, *array.shape))
        _, _, *rest = array.shape
        array = jnp.broadcast_to(array, (self.size, self.length, *rest))
        return array.reshape(self.size * self.length, *rest)

    def part(self, array, shape):
        """The transpose of `join`, for a mapped array of this shape."""
        array = array.reshape(self.size, self.length, *array.shape[1:])
        if is_one(shape[1]) and not is_one(self.length):
            return jnp.sum(array, axis=1, keepdims=True, dtype=array.dtype)
        return array


class Joined(NamedTuple):
    """An operation that computes all slices of a mapped axis, and how arrays join."""

    operation: Operation
    arguments: tuple[Any, ...]  # each a `Leading`, or what has its `join`
    outputs: tuple[Leading, ...]

    def __call__(self, arrays, mapped, types):
        """Runs it on arrays with the mapped axis first, to outputs of these types."""
        slots = zip(self.arguments, arrays, mapped, strict=True)
        outputs = self.operation(*(slot.join(x, flag) for slot, x, flag in slots))
        slots = zip(self.outputs, outputs, types, strict=True)
        return [slot.part(x, like.shape) for slot, x, like in slots]
