"""Whole numbers and ids in masks: compared in full, or refused with their name."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import (
    align,
    check_array,
    check_integers,
    known_number,
    saturate,
)
from jattn.arrays.shapes import Sizes


def is_number(value) -> bool:
    """Says whether a value is a whole number of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_int32(where: str, name: str, value):
    """Gives integers that combine with positions under strict type promotion, in int32.

    Raises:
        ValueError: As `check_integers` does.
    """
    return saturate(check_integers(where, name, value))


def one_number(where: str, name: str, value):
    """Gives one whole number with shape 1111, int32; saturated at the ends of int32.

    Positions are int32, so a number beyond its ends masks the same pairs as the end does.
    A known number becomes a NumPy array, so that the blocks that it hides are found before
    the call runs.
    """
    number = as_int32(where, name, value)
    if number.size != 1:
        raise ValueError(
            f"{where}: `{name}` must be one whole number, got shape {number.shape}; for "
            f"one of each example write a function, `lambda b, n, t, s: …{name}[b]…`."
        )
    return number.reshape(1, 1, 1, 1)


def common_dtype(where: str, ids: dict):
    """Gives a type that holds the ids of both sides, or raises if JAX has none."""
    left, right = (array.dtype for array in ids.values())
    if left == right:
        return left
    dtype = np.promote_types(left, right)
    # NumPy answers float64 for int64 with uint64. And JAX cuts 64 bits while x64 is off.
    if (
        dtype.kind == "f"
        or not jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype)).dtype == dtype
    ):
        raise ValueError(
            f"{where}: `query_ids` and `key_ids` must be of one type, or of two that a "
            f"third holds, got {left} and {right}; convert one with `.astype`."
        )
    return dtype


def padding_number(where: str, value, dtype):
    """Gives the id of padding with shape 1111, in the type of the ids."""
    number = check_array(where, "padding_id", value) if hasattr(value, "dtype") else value
    ends = jnp.iinfo(dtype)
    known = known_number(number)
    if known is not None and not ends.min <= known <= ends.max:
        raise ValueError(
            f"{where}: `padding_id` must be one of the numbers that ids of {dtype} can "
            f"have, got {number}."
        )
    if known is not None:
        return np.full((1, 1, 1, 1), known, dtype)
    return one_number(where, "padding_id", number).astype(dtype)


def known_whole(where: str, name: str, value, least: int, most=math.inf) -> int:
    """Gives a whole number that a program is made with, known and within its limits."""
    number = known_number(value)
    if isinstance(number, int) and least <= number <= most:
        return number
    limit, cure = f"at least {least}", "give an `int`"
    if isinstance(number, int) and number > most:
        limit, cure = f"at most {most}", "give a smaller one"
    raise ValueError(
        f"{where}: `{name}` must be a whole number, {limit}, got {value!r}; {cure}."
    )


def check_whole(where: str, name: str, value, signed: bool = True) -> None:
    """Checks that a value is a whole number that a type of JAX holds, or an array of such.

    Accepts all other objects, for JAX may put anything into a pytree.
    """
    dtype = getattr(value, "dtype", None)
    if is_number(value):
        # The width of JAX's default integer: 64 bits with `jax_enable_x64`, else 32. An
        # unsigned type holds one bit more above.
        bits = jnp.iinfo(jnp.asarray(0).dtype).bits
        if -(2 ** (bits - 1)) <= int(value) < 2 ** (bits - signed):
            return
        got = f"{value}, which does not fit {bits} bits"
    elif dtype is not None:
        if jnp.issubdtype(dtype, jnp.integer):
            return
        got = f"an array of {dtype}"
    elif value is None or isinstance(value, float | bool | str | list | tuple):
        got = repr(value)
    else:
        return
    raise ValueError(f"{where}: `{name}` must be a whole number, got {got}.")


def check_lengths(where: str, name: str, array, batch: tuple[int, ...]):
    """Gives one integer for all examples, or one for each, in int32."""
    array = as_int32(where, name, array)
    if array.shape not in ((), batch, (1,) * len(batch)):
        raise ValueError(
            f"{where}: `{name}` must have shape () or B = {batch}, got {array.shape}; give "
            f"one length for all or one per example."
        )
    return array


def per_example(where: str, name: str, array, sizes: Sizes) -> jax.Array:
    """Gives one integer for all examples, or one for each, as B111 or 1111 in int32."""
    array = check_lengths(where, name, array, sizes.batch)
    if array.ndim == 0:
        return array.reshape(1, 1, 1, 1)
    return align(where, name, array, sizes, "")
