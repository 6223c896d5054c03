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
from jax import lax

# The largest number of each format; int8 and int4 leave out their lowest, so that −x can
# be stored wherever x can.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}


def is_rounded(dtype: str) -> bool:
    """Says whether vectors of this dtype have a scale."""
    return dtype in LARGEST


def stored_type(dtype: str) -> Any:
    """Gives the dtype of the array that holds them.

    Two numbers of int4 are one of uint8, and those of float8 are kept as bits. Those of 16
    bits are float32 on CPU. XLA:CPU would widen such arrays whole in each step, in 5 to 50
    times the time of the step; it leaves bits alone.
    """
    if dtype in ("bfloat16", "float16") and jax.default_backend() == "cpu":
        return jnp.dtype("float32")
    return jnp.dtype("uint8" if dtype in ("int4", "float8_e4m3fn") else dtype)


def stored_size(dtype: str, size: int) -> int:
    """Says how many numbers of the array hold a vector of `size`."""
    return -(-size // 2) if dtype == "int4" else size


def rounded(vectors: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Rounds vectors along the last axis.

    Returns:
        The numbers, as they are stored, and the scales, float32, without the last axis.
    """
    vectors = lax.stop_gradient(vectors).astype(jnp.float32)
    largest = jnp.max(jnp.abs(vectors), axis=-1, initial=0)
    # Multiplied, for a compiler may or may not replace a division by a known number.
    scale = largest * jnp.float32(1 / LARGEST[dtype])
    sound = jnp.isfinite(scale)
    divisor = jnp.where(sound & (scale > 0), scale, 1)[..., None]
    numbers = jnp.where(sound[..., None], vectors / divisor, 0)
    scale = jnp.where(sound, scale, jnp.nan)
    if dtype == "float8_e4m3fn":
        return lax.bitcast_convert_type(numbers.astype(dtype), jnp.uint8), scale
    numbers = jnp.round(numbers).astype(jnp.int8)
    return (_packed(numbers) if dtype == "int4" else numbers), scale


def numbers_of(stored: jax.Array, dtype: str, axis: int, size: int, wide):
    """Gives the rounded numbers as floats, in parts that follow on `axis`.

    Two parts are not joined: to multiply one after the other takes a fifth of the time.
    """
    if dtype == "float8_e4m3fn":
        stored = lax.bitcast_convert_type(stored, jnp.dtype(dtype))
    if dtype != "int4":
        return [stored.astype(wide)]
    low, high = (stored << 4).astype(jnp.int8) >> 4, stored.astype(jnp.int8) >> 4
    high = lax.slice_in_dim(high, 0, size - stored.shape[axis], axis=axis)
    return [low.astype(wide), high.astype(wide)]


def _packed(numbers: jax.Array) -> jax.Array:
    """Packs two numbers of 4 bits in a byte: the first half low, the second high."""
    half = stored_size("int4", numbers.shape[-1])
    odd = 2 * half - numbers.shape[-1]
    numbers = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, odd)])
    low, high = numbers[..., :half].astype(jnp.uint8), numbers[..., half:].astype(jnp.uint8)
    return (low & jnp.uint8(15)) | (high << 4)
