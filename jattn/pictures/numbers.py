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
from jattn.arrays.checks import known_number
from jattn.arrays.integers import known_whole
from jattn.blocks.block_table import BlockTable
from jattn.blocks.kinds import EMPTY, FULL, PARTIAL, resize, spread

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "allowed",
    "bar",
    "by_layer",
    "cells",
    "check_tokens",
    "grid",
    "heads_of",
    "lengths",
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


def lengths(where: str, length, key_length) -> tuple[int, int]:
    """Checks how many queries and keys a picture of a mask has; as many keys by default."""
    length = known_whole(where, "length", length, 1)
    return length, known_whole(
        where, "key_length", length if key_length is None else key_length, 1
    )


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


def by_layer(entropies) -> np.ndarray:
    """Computes the mean entropy of each head, a row per layer; missing heads are NaN.

    Raises:
        ValueError: If there is no layer, or one has no head or query.
    """
    layers = [np.asarray(layer, np.float64) for layer in entropies]
    if not layers or any(layer.ndim == 0 or layer.size == 0 for layer in layers):
        raise ValueError(
            f"entropy: `entropies` must be one array BTN, TN or N for each layer, none of "
            f"them empty, got shapes {[layer.shape for layer in layers]}."
        )
    means = np.full((len(layers), max(layer.shape[-1] for layer in layers)), np.nan)
    for row, layer in zip(means, layers, strict=True):
        row[: layer.shape[-1]] = layer.reshape(-1, layer.shape[-1]).mean(axis=0)
    return means


def shown_of(where: str, weights, query_tokens, key_tokens, heads):
    """Gives the weights to draw for each panel, the panels' names, and both sides' tokens.

    Raises:
        ValueError: If `weights` is not BNTS, NTS or TS, or tokens or heads do not fit it.
    """
    array = np.asarray(weights, np.float64)
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(
            f"{where}: `weights` must be BNTS, NTS or TS with no axis of size 0, got "
            f"shape {array.shape}."
        )
    N, T, S = (1, *array.shape)[-3:]
    chosen = _chosen(where, heads, N)
    drawn = array.reshape(-1, N, T, S)[:, chosen]
    examples = [f"example {b}, " for b in range(len(drawn))] if len(drawn) > 1 else [""]
    names = [f"{example}head {head % N}" for example in examples for head in chosen]
    key_tokens = query_tokens if key_tokens is None and T == S else key_tokens
    check_tokens(where, "query_tokens", query_tokens, "T", T)
    check_tokens(where, "key_tokens", key_tokens, "S", S)
    names = names if array.ndim > 2 else [""]
    return drawn.reshape(-1, T, S), names, query_tokens, key_tokens


def heads_of(where: str, received, tokens, heads) -> tuple[np.ndarray, list[str]]:
    """Gives what the keys of one example receive, a row for each chosen head; and names.

    Raises:
        ValueError: If `received` is not SN or S, or tokens or heads do not fit it.
    """
    array = np.asarray(received, np.float64)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{where}: `received` must be SN or S, of one example and not empty, got shape "
            f"{array.shape}; take one example by its index."
        )
    S, N = array.shape[0], array.size // array.shape[0]
    check_tokens(where, "tokens", tokens, "S", S)
    chosen = _chosen(where, heads, N)
    names = [f"head {head % N}" for head in chosen] if array.ndim == 2 else [""]
    return array.reshape(S, N).T[chosen], names


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


def _chosen(where: str, heads, N: int) -> list[int]:
    if heads is None:
        return list(range(N))
    found = [known_number(head) for head in np.atleast_1d(np.asarray(heads, object))]
    chosen = [x for x in found if isinstance(x, int) and -N <= x < N]
    if not chosen or len(chosen) < len(found):
        raise ValueError(
            f"{where}: `heads` must be indices of the N={N} heads, whole numbers, got "
            f"{heads!r}."
        )
    return chosen


def check_tokens(where: str, name: str, tokens, letter: str, length: int) -> None:
    """Checks that tokens, if there are any, are a string for each query or key."""
    if tokens is not None and (isinstance(tokens, str) or len(tokens) != length):
        got = "one string" if isinstance(tokens, str) else str(len(tokens))
        raise ValueError(
            f"{where}: `{name}` must have {letter}={length} tokens, got {got}; give one "
            f"string for each."
        )
