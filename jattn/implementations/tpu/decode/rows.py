"""Queries, and the arrays of masks and modifiers, as rows of a tile.

The rows of a key head are the T queries of its G query heads, T together: row g · T + t.
The kernel reads

    rows      B or 1 × K or 1 × rows or 1 × 1
    columns   B or 1 × 1 × 1 × S
    tiles     B or 1 × K or 1 × rows × S
"""

import jax.numpy as jnp

from jattn.implementations.joint import kind as kind_of_pairs


def kind(array) -> str:
    """Says whether an array aligned with BNTS is a row, column or tile of each block.

    Where each head has its own column, rows of different heads read different ones.
    """
    what = kind_of_pairs(array)
    return "tile" if what == "column" and array.shape[1] > 1 else what


def queries(array, sizes):
    """Rearranges BTN… to B × K × rows × …."""
    B, T, N, *rest = array.shape
    array = array.reshape(B, T, sizes.K, N // sizes.K, *rest)
    return jnp.moveaxis(array, 1, 3).reshape(B, sizes.K, -1, *rest)


def unqueries(array, sizes):
    """Rearranges B × K × rows × … to BTN…."""
    B, N, T, _ = sizes.BNTS
    return jnp.moveaxis(array.reshape(B, N, T, *array.shape[3:]), 1, 2)


def arrange(array, sizes):
    """Arranges an array aligned with BNTS, in a dtype that the kernel stores."""
    what = kind(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.int8 if what == "tile" else jnp.int32)
    if array.dtype == jnp.bfloat16 and what != "tile":
        array = array.astype(jnp.float32)
    B, N, T, S = array.shape
    if what == "column" or (N, T, S) == (1, 1, 1):
        return array
    heads = sizes.K if N > 1 else 1
    array = jnp.broadcast_to(array, (B, heads * sizes.G, sizes.T, S))
    return array.reshape(B, heads, -1, S)
