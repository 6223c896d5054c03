"""How the slices of a mapped axis become one call of an operation."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jattn.arrays.shapes import is_one
from jattn.operations.operation import Operation


@dataclasses.dataclass(frozen=True)
class Kept:
    """The join of an argument that is the same for every slice: it stays as it is."""

    def join(self, array, is_mapped: bool):
        """Gives the array itself, which is not mapped."""
        del is_mapped
        return array


@dataclasses.dataclass(frozen=True)
class Leading:
    """The join of a mapped axis of `size` with an array's first axis, of `length`.

    The first axis may be 1, broadcast to `length`. Such an array stays as it is, unless it
    is mapped or each slice needs its own copy (`apart`).
    """

    size: Any
    length: Any
    apart: bool
    wide: Any = None  # the dtype of an array that is copied, or None: its own

    def join(self, array, is_mapped: bool):
        """Merges the mapped axis, the first of a mapped array, with the axis after it."""
        if not is_mapped:
            if not self.apart and is_one(array.shape[0]):
                return array
            array = array if self.wide is None else array.astype(self.wide)
            array = jnp.broadcast_to(array, (self.size, *array.shape))
        _, _, *rest = array.shape
        array = jnp.broadcast_to(array, (self.size, self.length, *rest))
        return array.reshape(self.size * self.length, *rest)

    def part(self, array, shape):
        """Computes the transpose of `join`, for a mapped array of this shape."""
        array = array.reshape(self.size, self.length, *array.shape[1:])
        # The transpose of a broadcast is a sum.
        if is_one(shape[1]) and not is_one(self.length):
            return jnp.sum(array, axis=1, keepdims=True, dtype=array.dtype)
        return array


class Joined(NamedTuple):
    """An operation that computes all slices of a mapped axis, and how arrays join."""

    operation: Operation
    arguments: tuple[Any, ...]  # each a `Leading`, or another object with a `join`
    outputs: tuple[Leading, ...]

    def __call__(self, arrays, mapped, types):
        """Runs the operation on arrays with the mapped axis first; gives these types."""
        slots = zip(self.arguments, arrays, mapped, strict=True)
        outputs = self.operation(*(slot.join(x, flag) for slot, x, flag in slots))
        slots = zip(self.outputs, outputs, types, strict=True)
        return [slot.part(x, like.shape).astype(like.dtype) for slot, x, like in slots]
