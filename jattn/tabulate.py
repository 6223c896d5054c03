"""Block tables made ahead of a call."""

import jax
import numpy as np

from jattn.masks import as_mask
from jattn.meshes import across
from jattn.problem import given, pose_mask
from jattn.shapes import check_array, measure
from jattn.skipping import block_table as block_kinds
from jattn.tables import BlockTable

__all__ = ["block_table"]


def block_table(
    mask, query, key, *, query_position=None, key_position=None, block=128
) -> BlockTable:
    """Finds the blocks of a mask that can be skipped, once for many calls.

    `attention` does this by itself in every call. Where many calls share a mask, such as
    the layers of a network, give them one table as `mask`. It serves blocks of every size
    that an implementation asks for, best those that are multiples of its own.

    Args:
        mask: What `attention` takes as `mask`; its arrays may be traced.
        query: `BTNH`, as `attention` will get it, or its `jax.ShapeDtypeStruct`.
        key: `BSKH`, likewise.
        query_position: What `attention` will get; its values must be the same.
        key_position: Likewise.
        block: How many queries and keys a block has: one number or a pair.

    Returns:
        A `BlockTable`: a mask, and a pytree, to give to `attention` as `mask`. It knows
        nothing of modifiers; what a modifier skips is found in each call.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
        >>> query = jax.ShapeDtypeStruct((1024, 8, 64), "float32")
        >>> print(block_table(lambda b, n, t, s: t >= s, query, query, block=256))
        BlockTable(1×1×1024×1024 in blocks of 256×256):
        37.5 % empty, 25 % partial, 37.5 % full
        ░
        █░
        ██░
        ███░
    """
    where = "block_table"
    blocks = _check_block(where, block)
    query, key = _check_shape(where, "query", query), _check_shape(where, "key", key)
    sizes = measure(where, query, key, key)
    if not sizes.are_known:
        raise ValueError(
            f"{where}: the sizes must be known numbers, got BNTS = {sizes.BNTS}; "
            f"`attention` with the mask itself takes symbolic ones."
        )
    mask = as_mask(mask, where)
    mask = mask.mask if isinstance(mask, BlockTable) else mask
    places = {"query_position": query_position, "key_position": key_position}
    return BlockTable(
        mask,
        _kinds(where, sizes, query.dtype, blocks, mask, places),
        lengths=(sizes.T, sizes.S),
        blocks=blocks,
        positions=(given(query_position), given(key_position)),
    )


@across("....")
def _kinds(where, sizes, dtype, blocks, mask, places):
    problem, operands = pose_mask(where, sizes, dtype, mask=mask, **places)
    return block_kinds(problem, operands, *blocks)


def _check_shape(where, name, array):
    if isinstance(array, jax.ShapeDtypeStruct):
        return array
    return check_array(where, name, array)


def _check_block(where: str, block) -> tuple[int, int]:
    pair = block if isinstance(block, tuple | list) else (block, block)
    whole = [isinstance(x, int | np.integer) and not isinstance(x, bool) for x in pair]
    if len(pair) != 2 or not all(whole) or min(pair) < 1:
        raise ValueError(
            f"{where}: `block` must be a number of queries and keys above 0, or a pair of "
            f"such, got {block!r}."
        )
    return int(pair[0]), int(pair[1])
