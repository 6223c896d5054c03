"""Pictures of weights, of masks, and of the sums of weights that `jattn.views` computes.

All functions return a `matplotlib.figure.Figure` that belongs to no window and no global
state. `figure.savefig("weights.png")` writes it, always on a white background.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jattn.arrays.integers import known_whole
from jattn.blocks.block_table import BlockTable
from jattn.pictures.colours import paint
from jattn.pictures.given import by_layer, lengths, shown_of
from jattn.pictures.numbers import EMPTY, FULL, PARTIAL, cells, pool
from jattn.pictures.panels import INK, panels, side
from jattn.pictures.words import received

__all__ = ["entropy", "mask", "received", "weights"]

_COLOURS = {FULL: "#1f4e79", PARTIAL: "#8fbcdb", EMPTY: "#efefec"}
# Along each side of a panel of weights; of a mask twice as many. More cells would be too
# small to tell apart.
_MOST_CELLS = 64
_MOST_NUMBERS = 12  # along a side; only up to here a cell has room for its number
_MOST_PANELS = 16  # in one figure, so that each panel stays readable


def weights(
    weights,
    *,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws attention weights, one panel per head, all in one scale of colours.

    More than 64 queries or keys are pooled into blocks, and a note in the picture says so:
    a block shows the mean over its queries of the weight on all of its keys.

    Args:
        weights: As from `jattn.attention_weights`, `BNTS` or `NTS`; or of one head, `TS`.
        query_tokens: What the queries are called, T of them; numbered by default.
        key_tokens: What the keys are called, S of them; by default as the queries if T = S.
        heads: Indices of the heads to draw; by default all, up to sixteen panels.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If `weights` has another shape, or tokens or heads do not fit it.
    """
    drawn, names, *tokens = shown_of(
        "plot.weights", weights, query_tokens, key_tokens, heads
    )
    drawn, names, notes = _few(drawn, names, heads)
    T, S = drawn.shape[1:]
    block = (math.ceil(T / _MOST_CELLS), math.ceil(S / _MOST_CELLS))
    if block != (1, 1):
        drawn = pool(drawn, block)
        notes.append(f"one cell: {_times(block)}, mean over queries of sum over keys")
    finite = np.isfinite(drawn)
    if not finite.all():
        notes.append("grey: not a number")
    top = np.max(drawn, initial=0.0, where=finite) or 1.0
    rows, columns = map(side, tokens, (T, S), block)
    figure, axes = panels(
        names, rows, columns, title=title, note="; ".join(notes), across=_across(names)
    )
    paint(figure, axes, drawn, top, "weight", numbers=max(T, S) <= _MOST_NUMBERS)
    return figure


def mask(
    mask,
    length: int,
    key_length: int | None = None,
    *,
    block: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draws which query may attend to which key, for one example and head.

    A cell of several pairs shows whether all, some or none of them may attend. A
    `jattn.BlockTable` is drawn from its kinds, and its mask is not evaluated: a block that
    is not known to be full or empty is drawn as "some".

    Args:
        mask: What `jattn.attention` takes as `mask`: an object, a function, an array.
        length: The number of queries, T.
        key_length: The number of keys, S; T by default.
        block: How many queries and how many keys to draw as one cell; by default 1, or
            more where the picture would have more than 128 cells on a side.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If the mask does not fit these lengths, or a length is below 1.
    """
    length, key_length = lengths("plot.mask", length, key_length)
    if block is None:
        block = math.ceil(max(length, key_length) / (2 * _MOST_CELLS))
        if isinstance(mask, BlockTable):  # whole blocks of the table
            whole = max(mask.blocks)
            block = whole * math.ceil(block / whole)
    # A larger block has no more pairs.
    block = min(known_whole("plot.mask", "block", block, 1), max(length, key_length))
    kinds = cells(mask, length, key_length, (block, block))
    rows, columns = side(None, length, block), side(None, key_length, block)
    figure, (axis,) = panels([""], rows, columns, title=title, below=0.6)
    colours = ListedColormap([_COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)])
    aspect = axis.get_aspect()
    axis.imshow(kinds, cmap=colours, vmin=EMPTY, vmax=FULL, aspect=aspect)
    if max(kinds.shape) <= _MOST_CELLS:
        _rule(axis, kinds.shape)
    _add_legend(figure, block)
    return figure


def entropy(entropies: Sequence, *, title: str | None = None) -> Figure:
    """Draws how widely each head of each layer attends: layers downwards, heads across.

    A cell is the mean over examples and queries. For up to twelve heads, each cell also
    has its number.

    Args:
        entropies: One array for each layer, as from `jattn.attention_entropy`: `BTN` or
            `TN`, or its means, `N`. N may differ from layer to layer.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no layer, or a layer has no head.
    """
    means, _ = by_layer("plot.entropy", entropies)
    rows, columns = (side(None, length, 1) for length in means.shape)
    note = "mean over queries; log S: all S keys alike"
    note += "" if np.isfinite(means).all() else "; grey: none, or not a number"
    names = ("layer", "head")
    figure, axes = panels([""], rows, columns, title=title, note=note, sides=names)
    top = np.max(means, initial=0.0, where=np.isfinite(means)) or 1.0
    numbers = means.shape[1] <= _MOST_NUMBERS
    paint(figure, axes, means[None], top, "entropy (nats)", numbers=numbers)
    return figure


def _few(drawn, names, heads) -> tuple[np.ndarray, list[str], list[str]]:
    """Gives the panels to draw, their names and notes: all chosen heads, or the first."""
    if heads is not None or len(drawn) <= _MOST_PANELS:
        return drawn, names, []
    note = f"the first {_MOST_PANELS} of {len(drawn)} panels"
    return drawn[:_MOST_PANELS], names[:_MOST_PANELS], [note]


def _across(names: list[str]) -> int:
    """Gives the number of panels side by side: the heads of one example, at most four."""
    heads = sum(name.startswith(names[0].partition("head")[0]) for name in names)
    return heads if heads <= 4 else 4


def _rule(axis: Axes, shape: tuple[int, ...]) -> None:
    """Draws lines between the cells."""
    axis.hlines(np.arange(1, shape[0]) - 0.5, *axis.get_xlim(), "white", lw=0.7)
    axis.vlines(np.arange(1, shape[1]) - 0.5, *axis.get_ylim(), "white", lw=0.7)


def _add_legend(figure: Figure, block: int) -> None:
    """Says what the colours mean, and how much a cell holds."""
    names, note = {FULL: "may attend", EMPTY: "may not"}, None
    if block > 1:
        names = {FULL: "all may attend", PARTIAL: "some may", EMPTY: "none may"}
        note = f"one cell: {_times((block, block))}"
    style = {"edgecolor": INK, "linewidth": 0.5}
    figure.legend(
        handles=[
            Patch(facecolor=_COLOURS[x], label=name, **style) for x, name in names.items()
        ],
        loc="outside lower center",
        ncols=len(names),
        title=note,
        labelcolor=INK,
        frameon=False,
    ).get_title().set_color(INK)


def _times(block: tuple[int, int]) -> str:
    """Says what a cell holds: `1 query × 5 keys`."""
    queries = "query" if block[0] == 1 else "queries"
    return f"{block[0]} {queries} × {block[1]} {'key' if block[1] == 1 else 'keys'}"
