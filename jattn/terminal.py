"""The pictures of `jattn.plot` as text, for a terminal: each function returns a string.

Shades show each number as a share of the largest one, which the first line states.
"""

import math
from collections.abc import Sequence

import numpy as np

from jattn.arrays.integers import known_whole
from jattn.pictures.given import by_layer, heads_of, lengths, shown_of
from jattn.pictures.numbers import cells, grid, pool
from jattn.pictures.shades import (
    as_shares,
    bar,
    labels_of,
    largest,
    legend,
    line_ends,
    shade,
    upright,
)

__all__ = ["entropy", "mask", "received", "weights"]

_MOST_CELLS = 64  # along each side of a head, so that one head fits on a screen


def weights(
    weights,
    *,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    width: int = 80,
) -> str:
    """Draws attention weights, one head below the other: queries downwards.

    More queries or keys than fit into `width`, or more than 64, are pooled into blocks: a
    cell is then the mean over its queries of the sum over its keys, as the second line
    says.

    Args:
        weights: As from `jattn.attention_weights`, `BNTS` or `NTS`; or of one head, `TS`.
        query_tokens: What the queries are called, T of them; numbered by default.
        key_tokens: What the keys are called; by default as the queries if T = S.
        heads: Indices of the heads to draw; all by default.
        width: How many letters fit into a line.

    Returns:
        The lines, as one string.

    Raises:
        ValueError: If `weights` has another shape, or another argument does not fit it.

    Example:
        >>> print(weights([[1.0, 0.0], [0.25, 0.75]], query_tokens=["to", "be"]))
        weight, shares of 1.00: ░ 0.1–0.3  ▒ 0.3–0.5  ▓ 0.5–0.7  █ 0.7–1
           t b
           o e
        to ██
        be ░░██
    """
    width = known_whole("terminal.weights", "width", width, 1)
    given = (weights, query_tokens, key_tokens, heads)
    drawn, names, query_tokens, key_tokens = shown_of("terminal.weights", *given)
    T, S = drawn.shape[1:]
    rows = labels_of(query_tokens, T)
    margin = max(map(len, rows)) + 1
    most = max(min(width - margin, _MOST_CELLS), 1)
    block = math.ceil(T / _MOST_CELLS), math.ceil(S / most)
    drawn = pool(drawn, block) if block != (1, 1) else drawn
    repeat = 2 if margin + 2 * drawn.shape[2] <= width else 1
    lines = [legend("weight", drawn)]
    if block != (1, 1):
        lines.append(f"one cell: {block[0]} × {block[1]}, mean over queries, sum over keys")
    columns = labels_of(key_tokens, S)[:: block[1]]
    header = [" " * margin + line for line in upright(columns, repeat)]
    for name, panel in zip(names, as_shares(drawn), strict=True):
        lines += [*([name] if name else []), *header]
        for label, row in zip(rows[:: block[0]], panel, strict=True):
            shades = "".join(shade(share) * repeat for share in row)
            lines.append(f"{label:>{margin - 1}} {shades}".rstrip())
    return "\n".join(lines)


def mask(mask, length: int, key_length: int | None = None, *, width: int = 80) -> str:
    """Draws which query may attend to which key, for one example and head.

    Args:
        mask: What `jattn.attention` takes as `mask`; a `jattn.BlockTable` is drawn from
            its kinds of blocks.
        length: The number of queries, T, at least 1.
        key_length: The number of keys, S; T by default.
        width: How many letters fit into a line.

    Returns:
        The lines, as one string.

    Raises:
        ValueError: If the mask does not fit these lengths, or a number is below 1.

    Example:
        >>> print(mask(lambda b, n, t, s: t >= s, 3))
        █ all may attend  ░ some  · none; one cell: 1 × 1
          0
        0 ██····
        1 ████··
        2 ██████
    """
    width = known_whole("terminal.mask", "width", width, 1)
    length, key_length = lengths("terminal.mask", length, key_length)
    most = max(min(width - len(str(length)) - 1, _MOST_CELLS), 1)
    block = math.ceil(max(length, key_length) / most)
    # A `BlockTable` has `blocks`; of any other mask a cell may be one pair.
    size = max(getattr(mask, "blocks", (1, 1)))
    block = size * math.ceil(block / size)  # whole blocks of a table
    kinds = cells(mask, length, key_length, (block, block))
    first = f"█ all may attend  ░ some  · none; one cell: {block} × {block}"
    return "\n".join([first, *grid(kinds, (block, block), width)])


def entropy(entropies: Sequence, *, width: int = 80) -> str:
    """Draws how widely each head of each layer attends: layers downwards, heads across.

    A number is the mean over examples and queries, in nats. If the numbers do not fit into
    `width`, only the shades are drawn.

    Args:
        entropies: One array for each layer, as from `jattn.attention_entropy`: `BTN` or
            `TN`, or its means, `N`. N may differ from layer to layer.
        width: How many letters fit into a line.

    Returns:
        The lines, as one string.

    Raises:
        ValueError: If there is no layer, a layer has no head, or `width` is below 1.

    Example:
        >>> print(entropy([[3.0, 1.5], [0.5, 2.0]]))
        entropy in nats, shares of 3.00: ░ 0.1–0.3  ▒ 0.3–0.5  ▓ 0.5–0.7  █ 0.7–1
        head          0       1
        layer 0 ██ 3.00 ▓▓ 1.50
        layer 1 ░░ 0.50 ▓▓ 2.00
    """
    width = known_whole("terminal.entropy", "width", width, 1)
    means, counts = by_layer("terminal.entropy", entropies)
    labels = [f"layer {layer}" for layer in range(len(means))]
    # A column is 8 letters wide with its number, ` ██ 3.00`, and 3 without it, ` ██`.
    margin, wide = max(map(len, labels)), 8
    numbers = margin + wide * means.shape[1] <= width
    wide = wide if numbers else 3
    known = [row[:count] for row, count in zip(means, counts, strict=True)]
    lines = [legend("entropy in nats", np.concatenate(known))]
    lines.append(
        f"{'head':<{margin}}" + "".join(f"{n:>{wide}}" for n in range(means.shape[1]))
    )
    for label, row in zip(labels, known, strict=True):
        shares = row / (largest(means) or 1.0)
        shown = [
            f" {shade(share) * 2}" + (f" {mean:.2f}" if numbers else "")
            for mean, share in zip(row, shares, strict=True)
        ]
        lines.append(f"{label:<{margin}}{''.join(shown)}".rstrip())
    return "\n".join(lines)


def received(
    received,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    width: int = 80,
) -> str:
    """Draws the attention that each token of a text receives, as bars under the text.

    Args:
        received: As from `jattn.attention_received` for one example, `SN`; or averaged
            over heads, `S`.
        tokens: What the keys are called, S of them; numbered by default.
        heads: Indices of the heads to draw; all by default.
        width: How many letters fit into a line.

    Returns:
        The lines, as one string.

    Raises:
        ValueError: If `received` has another shape, or another argument does not fit it.

    Example:
        >>> print(received([2.0, 0.5, 1.0], ["to", "be", "or"]))
        received: a bar of full height █ is 2.00
        to be or
        ██ ▂▂ ▄▄
    """
    width = known_whole("terminal.received", "width", width, 1)
    drawn, names = heads_of("terminal.received", received, tokens, heads)
    labels = labels_of(tokens, drawn.shape[1])
    margin = max(map(len, names)) + 1 if any(names) else 0
    shares = as_shares(drawn)
    lines = [f"received: a bar of full height █ is {largest(drawn):.2f}"]
    for start, stop in line_ends(labels, max(width - margin, 1)):
        words = labels[start:stop]
        lines.append(" " * margin + " ".join(words))
        for name, row in zip(names, shares[:, start:stop], strict=True):
            bars = [bar(x) * len(word) for x, word in zip(row, words, strict=True)]
            lines.append(f"{name:<{margin}}{' '.join(bars)}".rstrip())
    return "\n".join(lines)
