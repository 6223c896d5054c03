"""The blocks of a mask, and the single pairs inside its partial blocks.

A partial block is neither empty nor full. Most partial blocks look alike: under a causal
mask all of them have the same pairs. So each distinct pattern of pairs is stored once, and
each partial block has the number of its pattern.
"""

from typing import NamedTuple

import jax
import numpy as np

from jattn.blocks.block_table import BlockTable, block_table
from jattn.blocks.kinds import PARTIAL, spread
from jattn.pictures.numbers import allowed

__all__ = ["Blocks", "blocks_of"]

_MOST_PAIRS = 2**30  # 32768 × 32768: evaluating each pair takes half a minute
_MOST_BYTES = 6 * 2**20  # of patterns, in a page of at most 10 MB


class Blocks(NamedTuple):
    """The part of a mask that a page contains.

    Attributes:
        kinds: 0 empty, 1 partial, 2 full; blocks of queries × blocks of keys.
        block: The number of queries and of keys in a block.
        pattern_of: The number of the pattern of each partial block, in row-major order,
            counted from 1; 0 where the page does not contain the pattern.
        patterns: The pairs of each pattern as bits, each pattern in whole bytes; bits
            beyond the end of the mask are 0.
        why: Why the page lacks some pairs; empty if it has all.
    """

    kinds: np.ndarray
    block: tuple[int, int]
    pattern_of: np.ndarray
    patterns: np.ndarray
    why: str


def blocks_of(where: str, mask, T: int, S: int, block: int | None) -> Blocks:
    """Finds the blocks of a mask for one example and head, and the pairs in them.

    Args:
        where: The name of the public function, for messages.
        mask: What `attention` takes as `mask`; a `BlockTable` keeps its blocks.
        T: The number of queries.
        S: The number of keys.
        block: The size of a block; 128 by default, less for a short mask.

    Returns:
        The blocks.

    Raises:
        ValueError: If the mask does not fit.
    """
    table = _table(where, mask, T, S, block)
    kinds = np.asarray(spread(np.asarray(table.kinds)[0, 0], table.lengths, table.blocks))
    count = np.count_nonzero(kinds == PARTIAL)
    why = _why_not(table)
    if why:
        empty = np.zeros(0, np.uint8)
        return Blocks(kinds, table.blocks, np.zeros(count, np.uint32), empty, why)
    pattern_of, patterns, why = _patterns(table, kinds)
    return Blocks(kinds, table.blocks, pattern_of, patterns, why)


def _table(where: str, mask, T: int, S: int, block: int | None) -> BlockTable:
    if isinstance(mask, BlockTable):
        if mask.lengths != (T, S):
            raise ValueError(
                f"{where}: {mask!r} is not of {T} × {S} pairs; "
                f"give the lengths of the table."
            )
        return mask
    if block is None:
        # A short mask has eight blocks on a side, so that there is something to see.
        block = min(128, max(max(T, S) // 8, 1))
    query, key = (jax.ShapeDtypeStruct((length, 1, 1), "float32") for length in (T, S))
    # A larger block has no more pairs, but would take its room.
    return block_table(mask, query, key, block=(min(block, T), min(block, S)))


def _why_not(table: BlockTable) -> str:
    """Says why no pair can be evaluated; empty if pairs can be."""
    if any(table.positions):
        return "the table was made with positions, which it does not keep"
    if table.lengths[0] * table.lengths[1] > _MOST_PAIRS:
        return "there are too many to ask"
    return ""


def _patterns(table: BlockTable, kinds: np.ndarray):
    """Finds the pattern of each partial block.

    Returns:
        The number of each block's pattern, counted from 1; the patterns; and why some are
        missing.
    """
    (T, S), (rows, columns) = table.lengths, table.blocks
    found: dict[bytes, int] = {}
    pattern_of, size = [], 0
    for i, line in enumerate(kinds):
        partial = np.flatnonzero(line == PARTIAL)
        if not partial.size:
            continue
        # Repeating the last row keeps the shape, so that one compiled program serves all
        # strips. The rows beyond the end are cleared below.
        chosen = np.arange(i * rows, (i + 1) * rows)
        pairs = allowed(table.mask, T, S, rows=chosen.clip(max=T - 1))
        pairs = pairs & (chosen < T)[:, None]
        pairs = np.pad(pairs, ((0, 0), (0, kinds.shape[1] * columns - S)))
        for j in partial:
            bits = np.packbits(pairs[:, j * columns : (j + 1) * columns]).tobytes()
            if bits not in found and size + len(bits) <= _MOST_BYTES:
                size += len(bits)
                found[bits] = len(found) + 1
            pattern_of.append(found.get(bits, 0))
    patterns = np.frombuffer(b"".join(found), np.uint8)
    why = "" if all(pattern_of) else "they take too much room"
    return np.array(pattern_of, np.uint32), patterns, why
