"""What a picture of a mask or of weights shows, as small arrays and as text.

A mask over T queries and S keys is drawn in blocks of pairs. Each block is one of three:

    █ FULL      every pair of the block may attend
    ░ PARTIAL   some may
    · EMPTY     none may

If a block is a single pair, it is never partial, and the picture is the mask itself.
"""

import math

import jax.numpy as jnp
import numpy as np

from jattn.api.weights import attention_logits
from jattn.blocks.block_table import BlockTable
from jattn.blocks.kinds import EMPTY, FULL, PARTIAL, resize, spread

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "allowed",
    "bar",
    "cells",
    "grid",
    "pool",
]

_GLYPHS = "·░█"
_PAIRS_AT_ONCE = 2**24  # pairs in memory at a time, so that `cells` draws any length


def allowed(mask, length: int, key_length: int | None = None, *, rows=None) -> np.ndarray:
    """Evaluates a mask for one example and head: which query may attend to which key.

    Args:
        mask: What `jattn.attention` takes as `mask`.
        length: The number of queries, T.
        key_length: The number of keys, S; T by default.
        rows: Indices of the queries to evaluate; all by default.

    Returns:
        Booleans, `TS`; T counts the chosen rows.

    Raises:
        ValueError: If the mask does not fit these lengths.

    Example:
        >>> allowed(lambda b, n, t, s: t >= s, 2)
        array([[ True, False],
               [ True,  True]])
    """
    query = jnp.zeros((length, 1, 1))
    key = query if key_length is None else jnp.zeros((key_length, 1, 1))
    # Every product is 0, so that a logit is 0 or, where masked out, −∞.
    return np.asarray(attention_logits(query, key, mask=mask, rows=rows)[0] == 0)


def cells(mask, length: int, key_length: int, block: tuple[int, int]) -> np.ndarray:
    """Classifies each block of a mask: EMPTY, PARTIAL or FULL.

    Every pair is evaluated. For a `jattn.BlockTable` no pair is; the kinds of its first
    example and head are used.

    Args:
        mask: What `jattn.attention` takes as `mask`.
        length: The number of queries, T, at least 1.
        key_length: The number of keys, S, at least 1.
        block: The number of queries and of keys in a block; the last ones may have fewer.

    Returns:
        Small integers: a row for each block of queries, a column for each block of keys.

    Raises:
        ValueError: If the mask does not fit these lengths.
    """
    # A larger block has no more pairs, but would take its room.
    block = min(block[0], length), min(block[1], key_length)
    if isinstance(mask, BlockTable):
        return _table_cells(mask, (length, key_length), block)
    rows = block[0]
    height = math.ceil(length / rows)
    step = rows * min(max(_PAIRS_AT_ONCE // (rows * key_length), 1), height)
    strips = []
    for start in range(0, length, step):
        chosen = np.arange(start, start + step)
        # The last strip repeats the last row: that changes no block, and strips of equal
        # size compile once.
        strip = allowed(mask, length, key_length, rows=chosen.clip(max=length - 1))
        some = _over_blocks(np.logical_or, strip, block)
        every = _over_blocks(np.logical_and, strip, block)
        strips.append(some.astype(np.int8) + every)
    return np.concatenate(strips)[:height]


def _table_cells(table: BlockTable, lengths, block) -> np.ndarray:
    if lengths != table.lengths:
        raise ValueError(f"picture: {table!r} is not of {lengths[0]} × {lengths[1]} pairs.")
    kinds = resize(np.asarray(table.kinds)[0, 0], lengths, table.blocks, block)
    return np.asarray(spread(kinds, lengths, block))


def pool(weights: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Pools weights `…TS` into blocks: sums over keys, then takes the mean over queries.

    So a row of blocks has the same sum as the rows of weights have on average.
    """
    sums = np.add.reduceat(weights, np.arange(0, weights.shape[-1], block[1]), axis=-1)
    starts = np.arange(0, weights.shape[-2], block[0])
    counts = np.diff(starts, append=weights.shape[-2])  # the last block may have fewer
    return np.add.reduceat(sums, starts, axis=-2) / counts[:, None]


def printable(token, most: int) -> str:
    """Writes a token in visible characters, `most` of them at most."""
    token = "".join(x if x.isprintable() else repr(x)[1:-1] for x in str(token))
    return token if len(token) <= most else token[: most - 1] + "…"


def bar(share: float, width: int) -> str:
    """Draws a bar in steps of an eighth of a character; it fills `share` of `width`."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def grid(cells: np.ndarray, block: tuple[int, int], width: int) -> list[str]:
    """Draws classified blocks as lines of text, numbered by their first query and key.

    A block is two characters wide, which is about its height, if that fits into `width`.
    """
    height, columns = cells.shape
    margin = len(str((height - 1) * block[0])) + 1
    repeat = 2 if margin + 2 * columns <= width else 1
    longest = len(str((columns - 1) * block[1]))
    # From mark to mark there is room for the longest number.
    step = next(step for step in (5, 10, 20) if step * repeat > longest)
    marks = range(0, columns, step)
    ruler = "".join(str(column * block[1]).ljust(step * repeat) for column in marks)
    lines = [" " * margin + ruler.rstrip()]
    for row, kinds in enumerate(cells):
        drawn = "".join(_GLYPHS[kind] * repeat for kind in kinds)
        lines.append(str(row * block[0]).rjust(margin - 1) + " " + drawn)
    return lines


def _over_blocks(combine: np.ufunc, pairs: np.ndarray, block: tuple[int, int]):
    """Combines the pairs of each block into one."""
    for axis, size in enumerate(block):
        pairs = combine.reduceat(pairs, np.arange(0, pairs.shape[axis], size), axis=axis)
    return pairs
