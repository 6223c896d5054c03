"""Pictures of weights and of masks: queries downwards, keys to the right.

Both functions return a `matplotlib.figure.Figure` that belongs to no window and no global
state; `figure.savefig("weights.png")` writes it, on white in light and dark viewers alike.
"""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jattn.panels import INK, panels, side
from jattn.picture import EMPTY, FULL, PARTIAL, cells, pool
from jattn.tables import BlockTable

__all__ = ["mask", "weights"]

_COLOURS = {FULL: "#1f4e79", PARTIAL: "#8fbcdb", EMPTY: "#efefec"}
_MOST_CELLS = 64  # along each side of a panel of weights, and twice as many of a mask
_MOST_NUMBERS = 12  # along a side, to write each weight into its cell
_MOST_PANELS = 16


def weights(
    weights,
    *,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws attention weights, one panel per head, all in one scale of colours.

    More than 64 queries or keys are pooled into blocks, which the picture says: a block
    shows the mean over its queries of the weight on all of its keys.

    Args:
        weights: As from `jattn.attention_weights`, `BNTS` or `NTS`; or of one head, `TS`.
        query_tokens: What the queries are called, T of them; numbered by default.
        key_tokens: What the keys are called, S of them; by default as the queries if T = S.
        heads: Indices of the heads to draw; by default all, up to sixteen panels.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If `weights` has no such shape, or tokens or heads do not fit it.
    """
    drawn, names, notes = _select(weights, heads)
    T, S = drawn.shape[1:]
    if key_tokens is None and T == S:
        key_tokens = query_tokens
    _check_tokens("query_tokens", query_tokens, "T", T)
    _check_tokens("key_tokens", key_tokens, "S", S)
    block = (math.ceil(T / _MOST_CELLS), math.ceil(S / _MOST_CELLS))
    if block != (1, 1):
        drawn = pool(drawn, block)
        notes.append(f"one cell: {_times(block)}, mean over queries of sum over keys")
    finite = np.isfinite(drawn)
    if not finite.all():
        notes.append("grey: not a number")
    top = np.max(drawn, initial=0.0, where=finite) or 1.0
    rows, columns = side(query_tokens, T, block[0]), side(key_tokens, S, block[1])
    figure, axes = panels(
        names, rows, columns, title=title, note="; ".join(notes), across=_across(names)
    )
    colours = matplotlib.colormaps["BuPu"].with_extremes(bad="#9a9a9a")
    style = {"cmap": colours, "vmin": 0, "vmax": top, "aspect": axes[0].get_aspect()}
    images = [axis.imshow(x, **style) for x, axis in zip(drawn, axes, strict=True)]
    if max(T, S) <= _MOST_NUMBERS:
        for panel, axis in zip(drawn, axes, strict=True):
            _write_numbers(axis, panel, top)
    _add_scale(figure, images[0], axes)
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

    In blocks, each is one of three: all of its pairs may attend, some may, or none. A
    `jattn.BlockTable` is drawn as it stands, no pair is asked: what it does not know to be
    all or none counts as some.

    Args:
        mask: What `jattn.attention` takes as `mask`: an object, a function, an array.
        length: The number of queries, T.
        key_length: The number of keys, S; T by default.
        block: How many queries and how many keys to draw as one; by default 1, or more
            where the picture would have more than 128 on a side.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If the mask does not fit these lengths, or one of them is below 1.
    """
    key_length = length if key_length is None else key_length
    if block is None:
        block = math.ceil(max(length, key_length) / (2 * _MOST_CELLS))
        if isinstance(mask, BlockTable):  # whole blocks of the table
            whole = max(mask.blocks)
            block = whole * math.ceil(block / whole)
    if min(length, key_length, block) < 1:
        raise ValueError(
            f"plot.mask: `length`, `key_length` and `block` must be at least 1, got "
            f"{length}, {key_length} and {block}."
        )
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


def _select(weights, heads) -> tuple[np.ndarray, list[str], list[str]]:
    """The weights to draw, one panel after the other, their names, and what to note."""
    array = np.asarray(weights, np.float64)
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(
            f"plot.weights: `weights` must be BNTS, NTS or TS with no axis of size 0, got "
            f"shape {array.shape}."
        )
    N, T, S = (1, *array.shape)[-3:]
    array = array.reshape(-1, N, T, S)
    chosen = list(range(N)) if heads is None else [int(head) for head in heads]
    if not chosen or not all(-N <= head < N for head in chosen):
        raise ValueError(
            f"plot.weights: `heads` must be indices of the N={N} heads, got {chosen}."
        )
    examples = [f"example {b}, " for b in range(len(array))] if len(array) > 1 else [""]
    names = [f"{example}head {head % N}" for example in examples for head in chosen]
    drawn = array[:, chosen].reshape(-1, T, S)
    if np.ndim(weights) == 2:
        return drawn, [""], []
    if heads is not None or len(drawn) <= _MOST_PANELS:
        return drawn, names, []
    note = f"the first {_MOST_PANELS} of {len(drawn)} panels"
    return drawn[:_MOST_PANELS], names[:_MOST_PANELS], [note]


def _across(names: list[str]) -> int:
    """How many panels stand side by side: those of one example, if they are few."""
    heads = sum(name.startswith(names[0].partition("head")[0]) for name in names)
    return heads if heads <= 4 else 4


def _check_tokens(name: str, tokens, letter: str, length: int) -> None:
    if tokens is not None and len(tokens) != length:
        raise ValueError(
            f"plot.weights: `{name}` must have {letter}={length} tokens, got "
            f"{len(tokens)}; give one string for each."
        )


def _write_numbers(axis: Axes, panel: np.ndarray, top: float) -> None:
    """Writes each weight that is not next to nothing into its cell."""
    for (row, column), weight in np.ndenumerate(panel):
        if weight >= 0.005:
            text = f"{weight:.2f}".removeprefix("0")
            ink = "white" if weight > top / 2 else INK
            axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)


def _add_scale(figure: Figure, image, axes: list[Axes]) -> None:
    """Says what the colours of all panels mean."""
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
    size = float(axes[0].title.get_fontsize())
    bar.set_label("weight", color=INK, fontsize=size)
    bar.ax.tick_params(colors=INK, labelsize=0.85 * size)
    bar.outline.set(edgecolor=INK, linewidth=0.5)


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
    """What a cell holds: `1 query × 5 keys`."""
    queries = "query" if block[0] == 1 else "queries"
    return f"{block[0]} {queries} × {block[1]} {'key' if block[1] == 1 else 'keys'}"
