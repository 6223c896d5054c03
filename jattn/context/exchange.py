"""Heads for sequence: a device gets some heads, of all queries and keys.

    BTNH, T cut  →  BTNH, N cut  →  attention of whole rows  →  BTND, T cut

Where a device would get less than one key head, each is copied first, so that devices
with query heads of one group have its keys each.
"""

import math

import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import widened

__all__ = ["copied", "heads_to_sequence", "sequence_to_heads"]


def heads_to_sequence(array, axis):
    """Exchanges all heads of this device's part for its own heads of all the sequence."""
    return lax.all_to_all(array, axis, split_axis=2, concat_axis=1, tiled=True)


def sequence_to_heads(array, axis):
    """Undoes `heads_to_sequence`."""
    return lax.all_to_all(array, axis, split_axis=1, concat_axis=2, tiled=True)


def copies(kv_heads: int, devices: int) -> int:
    """Says how many copies of each key head let every device have as many."""
    return devices // math.gcd(devices, kv_heads)


def copied(array, devices: int):
    """Copies each head of keys or values as often as the devices need.

    Wide arrays, so that the cotangents of the copies add up wide.
    """
    if (count := copies(array.shape[2], devices)) == 1:
        return array
    return jnp.repeat(widened(array), count, axis=2).astype(array.dtype)
