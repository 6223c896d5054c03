"""Vectors rounded to 8 or 4 bits, with one scale for each.

    scale   = max |x| / largest number of the format         one for each token and head
    rounded = round(x / scale)
    x       ≈ scale · rounded

A vector is rounded when it is appended, alone, so in how many pieces a prompt comes changes
no bit. A vector with a NaN or Inf has scale NaN: who sees it gets NaN, and nobody else.
"""

from typing import Any

import jax
import jax.numpy as jnp

# The largest number of each format; int8 and int4 leave out their lowest, so that −x can
# be stored wherever x can.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}


def is_rounded(dtype: str) -> bool:
    """Says whether vectors of this dtype have a scale."""
    return dtype in LARGEST


def stored_type(dtype: str) -> Any:
    """The dtype of the array that holds them: two numbers of int4 are one of uint8."""
    return jnp.dtype("uint8" if dtype == "int4" else dtype)


def stored_size(dtype: str, size: int) -> int:
    """How many numbers of the array hold a vector of `size`."""
    return -(-size // 2) if dtype == "int4" else size


def rounded(vectors: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Rounds vectors along the last axis.

    Returns:
        The numbers, as they are stored, and the scales, float32, without the last axis.
    """
    vectors = jax.lax.stop_gradient(vectors).astype(jnp.float32)
    largest = jnp.max(jnp.abs(vectors), axis=-1, initial=0)
    # Divided here, and so in the same way wherever it runs: compilers may replace a
    # division by a constant, but not one array by another.
    scale = largest / jnp.full_like(largest, LARGEST[dtype])
    sound = jnp.isfinite(scale)
    divisor = jnp.where(sound & (scale > 0), scale, 1)[..., None]
    numbers = jnp.where(sound[..., None], vectors / divisor, 0)
    scale = jnp.where(sound, scale, jnp.nan)
    if dtype == "float8_e4m3fn":
        return numbers.astype(dtype), scale
    numbers = jnp.round(numbers).astype(jnp.int8)
    return (_packed(numbers) if dtype == "int4" else numbers), scale


def numbers_of(stored: jax.Array, dtype: str, axis: int, size: int, wide) -> jax.Array:
    """The rounded numbers as floating ones; `axis` is that of the vectors, `size` long."""
    if dtype == "int4":
        low, high = (stored << 4).astype(jnp.int8) >> 4, stored.astype(jnp.int8) >> 4
        stored = jnp.concatenate([low, high], axis)
        stored = jax.lax.slice_in_dim(stored, 0, size, axis=axis)
    return stored.astype(wide)


def _packed(numbers: jax.Array) -> jax.Array:
    """Two numbers of 4 bits in one byte: the first half low, the second half high."""
    half = stored_size("int4", numbers.shape[-1])
    odd = 2 * half - numbers.shape[-1]
    numbers = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, odd)])
    low, high = numbers[..., :half].astype(jnp.uint8), numbers[..., half:].astype(jnp.uint8)
    return (low & jnp.uint8(15)) | (high << 4)
