"""Writes rows into an array that keeps its place in memory.

`lax.dynamic_update_slice` moves its start where the rows would not fit, and so would
overwrite the last tokens in silence. Here what fits is written and the rest is dropped.

Both functions are updates that XLA does in place where the array is donated or carried
through a loop: nothing else is read or copied.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import is_one


def write_run(array: jax.Array, rows: jax.Array, start, count, axis: int) -> jax.Array:
    """Writes the first `count` of the rows from `start` on, two integers.

    Args:
        array: The array, with its slots along `axis`.
        rows: As many as are to be written at most; of the array's shape but along `axis`.
        start: The slot of the first row.
        count: How many rows count.
        axis: Where the slots are.
    """
    length = rows.shape[axis]
    at = jnp.clip(start, 0, array.shape[axis] - length)
    # Where the slice was moved back by `late`, the rows move on by as much in it.
    late = start - at
    shape = [length if i == axis % array.ndim else 1 for i in range(array.ndim)]
    slot = lax.broadcasted_iota(jnp.int32, shape, axis % array.ndim)
    if not is_one(length):
        rows = jnp.roll(rows, jnp.clip(late, 0, length), axis)
    old = lax.dynamic_slice_in_dim(array, at, length, axis)
    rows = jnp.where((slot >= late) & (slot - late < count), rows, old)
    return lax.dynamic_update_slice_in_dim(array, rows, at, axis)


def write_at(array: jax.Array, rows: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """Writes each row of each example into its own slot.

    Args:
        array: The array, with examples first and slots along `axis`.
        rows: BT…, the axes of the array without its slots after BT.
        slots: Where each row goes, BT, all different in an example; beyond the last slot
            for rows that are dropped.
        axis: Where the slots are.
    """
    example = jnp.arange(array.shape[0], dtype=jnp.int32)[:, None]
    return write_pairs(array, rows, (example, slots), (0, axis))


def write_pairs(array: jax.Array, rows: jax.Array, indices, axes) -> jax.Array:
    """Writes rows where several indices say, each along one of `axes`."""
    where: list = [slice(None)] * array.ndim
    for index, axis in zip(indices, axes, strict=True):
        where[axis] = index
    return array.at[tuple(where)].set(rows, mode="drop", unique_indices=True)


def run_slots(start, count, T: int, capacity: int) -> jax.Array:
    """Says where each of T tokens goes, …T; beyond the count, beyond the last slot."""
    step = jnp.arange(T, dtype=jnp.int32).reshape(*[1] * start.ndim, T)
    slots = start[..., None] + step
    return jnp.where((step < count[..., None]) & (slots < capacity), slots, capacity + step)
