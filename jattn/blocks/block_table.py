"""Block tables: the kinds of a mask's blocks, made once for many calls."""

from typing import Any

import jax
import numpy as np

from jattn.arrays.checks import check_array
from jattn.arrays.integers import is_number
from jattn.arrays.meshes import across
from jattn.arrays.shapes import Sizes, measure
from jattn.blocks.kinds import draw, shares, spread
from jattn.blocks.of_call import block_table as block_kinds
from jattn.call.pose import pose_mask
from jattn.call.problem import given
from jattn.masks import Mask, as_mask
from jattn.pytree import pytree

__all__ = ["BlockTable", "block_table"]


@pytree("mask", "kinds", static=("lengths", "blocks", "positions"))
class BlockTable(Mask):
    """A mask, and for each of its blocks whether it is empty, partial or full.

    `jattn.block_table` makes one. As the argument `mask` it allows what its mask allows,
    and the implementation reads the kinds of its blocks instead of finding them again. It
    is a pytree: many layers can share one table, through `jit` and `scan`, or each layer
    can have its own. Combined by `&`, `|` and `~` it counts as its mask alone. `print`
    draws it.

    Attributes:
        mask: The mask that says which pairs may attend.
        kinds: 0 empty, 1 partial, 2 full; B or 1 × N or 1 × query blocks × key blocks.
        lengths: T and S.
        blocks: How many queries and how many keys a block has.
        positions: Whether it was made with `query_position` and with `key_position`.
    """

    mask: Mask
    kinds: jax.Array
    lengths: tuple[int, int]
    blocks: tuple[int, int]
    positions: tuple[bool, bool] = (False, False)

    def aligned(self, sizes: Sizes) -> Any:
        """Gives the mask's arrays."""
        return self.mask.aligned(sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says what the mask allows."""
        return self.mask.allows(b, n, t, s, elements)

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, for a mask that reads positions only."""
        return self.mask(b, n, t, s)

    def known_blocks(self, where: str, sizes: Sizes, positions: tuple[bool, bool]):
        """Gives the block size and the kinds of the blocks.

        Raises:
            ValueError: If the table is for other sizes, or only one of the table and the
                call has positions.
        """
        advice = "make one for this call with `jattn.block_table`"
        if self.lengths != (sizes.T, sizes.S):
            raise ValueError(
                f"{where}: `mask` is a block table for T={self.lengths[0]} and "
                f"S={self.lengths[1]}, but the inputs have T={sizes.T} and S={sizes.S}; "
                f"{advice}."
            )
        for letter, have in zip("BN", self.kinds.shape[:2], strict=True):
            if have not in (1, getattr(sizes, letter)):
                raise ValueError(
                    f"{where}: `mask` is a block table for {letter}={have}, but the inputs "
                    f"have {letter}={getattr(sizes, letter)}; {advice}."
                )
        names = ("query_position", "key_position")
        for name, made, asked in zip(names, self.positions, positions, strict=True):
            if made != asked:
                with_or_not = "with" if made else "without"
                raise ValueError(
                    f"{where}: `mask` is a block table made {with_or_not} `{name}`; give "
                    f"the positions that it was made with, or {advice}."
                )
        return self.blocks, self.kinds

    def __repr__(self) -> str:
        (T, S), (rows, columns) = self.lengths, self.blocks
        axes = "×".join(map(str, np.shape(self.kinds)[:-2]))
        return f"BlockTable({axes}×{T}×{S} in blocks of {rows}×{columns})"

    def __str__(self) -> str:
        kinds = self.kinds
        # Transformations may also put objects other than arrays in place of the kinds.
        if isinstance(kinds, jax.core.Tracer) or not hasattr(kinds, "ndim"):
            return f"{self!r}: known when it runs"
        kinds = np.asarray(spread(np.asarray(kinds), self.lengths, self.blocks))
        text = f"{self!r}:\n{', '.join(shares(kinds))}"
        if not kinds.size:
            return text
        kinds = kinds.reshape(-1, *kinds.shape[-2:])
        if len(kinds) > 1:
            text += "; of the first:"
        return "\n".join([text, *draw(kinds[0])])


def block_table(
    mask, query, key, *, query_position=None, key_position=None, block=128
) -> BlockTable:
    """Finds the blocks of a mask that can be skipped, once for many calls.

    `attention` does this by itself in every call. Where many calls share a mask, such as
    the layers of a network, give them one table as `mask`. Implementations can use it with
    blocks of any size; it is most precise for multiples of its own block size.

    Args:
        mask: What `attention` takes as `mask`; its arrays may be traced.
        query: `BTNH`, as `attention` will get it, or its `jax.ShapeDtypeStruct`.
        key: `BSKH`, likewise.
        query_position: As `attention` will get it, with the same values.
        key_position: Likewise.
        block: How many queries and keys a block has: one number or a pair.

    Returns:
        A `BlockTable`: a mask, and a pytree, to give to `attention` as `mask`. It does not
        depend on modifiers; each call finds the blocks that its modifier skips.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

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
    # The mask does not see the values, so the keys stand in for them.
    sizes = measure(where, query, key, key)
    if not sizes.are_known:
        raise ValueError(
            f"{where}: the sizes must be known numbers, got BNTS = {sizes.BNTS}; "
            f"`attention` with the mask itself takes symbolic ones."
        )
    mask = as_mask(mask, where)
    # Of a table, only the mask counts: its kinds are for other blocks.
    mask = mask.mask if isinstance(mask, BlockTable) else mask
    # The kinds are those of the numbers now, which a caller may write over in NumPy.
    mask = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, mask)
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
        return jax.eval_shape(lambda x: x, array)  # whose sizes are numbers of Python
    return check_array(where, name, array)


def _check_block(where: str, block) -> tuple[int, int]:
    pair = block if isinstance(block, tuple | list) else (block, block)
    if (
        len(pair) != 2
        or not all(map(is_number, pair))
        or min(pair) < 1
        or max(pair) >= 2**31
    ):
        raise ValueError(
            f"{where}: `block` must be a number of queries and keys above 0 and below 2³¹, "
            f"or a pair of such, got {block!r}."
        )
    return int(pair[0]), int(pair[1])
