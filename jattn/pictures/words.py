"""A text as a picture, in which a word's background shows what the word receives."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jattn.pictures.colours import add_scale, colours, ink, paint
from jattn.pictures.given import heads_of
from jattn.pictures.numbers import printable
from jattn.pictures.panels import INK, panels, side, wrap

__all__ = ["received"]

_POINTS = 10  # size of the letters
_LETTER = 0.602 * _POINTS / 72  # width in inches of each letter, as the font is monospace
_LINE, _GAP = 0.25, 0.2  # inches from line to line, and in addition between heads
_ACROSS = 96  # letters in a line
_MOST_LETTERS = 24  # of a token; the rest is cut off
_MOST_LINES = 120  # of all heads; a longer text is drawn as cells
_MOST_CELLS = 64  # in a row; more keys are pooled


class _Word(NamedTuple):
    """A word and its place."""

    text: str
    column: int
    line: int


def received(
    received,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the attention that each token of a text receives.

    The text is written once for each head, and the background of each token shows what the
    token receives. Without tokens, or if the text would take more than 120 lines, each head
    is a row of cells instead. More than 64 keys are then pooled into blocks; a block shows
    the mean of its keys, and a note below the picture says so.

    Args:
        received: As from `jattn.attention_received` for one example, `SN`; or averaged
            over heads, `S`.
        tokens: The names of the keys, S of them.
        heads: Indices of the heads to draw; all by default.
        title: The text above the picture.

    Returns:
        The figure.

    Raises:
        ValueError: If `received` has no such shape, or tokens or heads do not fit it.
    """
    drawn, names = heads_of("plot.received", received, tokens, heads)
    finite = np.isfinite(drawn)
    top = np.max(drawn, initial=0.0, where=finite) or 1.0
    if tokens is not None:
        words, lines = _flow(tokens)
        if lines * len(names) <= _MOST_LINES:
            return _write(words, lines, drawn, names, top, title)
    return _strips(drawn, tokens, names, top, title)


def _flow(tokens: Sequence[str]) -> tuple[list[_Word], int]:
    """Places the tokens one after the other, and counts the lines."""
    words, column, line = [], 0, 0
    for token in tokens:
        text = printable(token, _MOST_LETTERS) or " "
        if column and column + len(text) > _ACROSS:
            column, line = 0, line + 1
        words.append(_Word(text, column, line))
        column += len(text) + 1
    return words, line + 1


def _write(words, lines, drawn, names, top, title) -> Figure:
    """Writes the text once for each head."""
    letters = max(word.column + len(word.text) for word in words)
    left = 0.25 + (max(map(len, names)) + 2) * _LETTER * any(names)
    width = max(left + letters * _LETTER + 1.2, 4.5)
    title = wrap(title, 12, width)
    above = 0.15 + 0.22 * len(title.splitlines()) + 0.1 * bool(title)
    height = max(above + len(names) * (lines * _LINE + _GAP) + 0.1, above + 1.3)
    figure = Figure((width, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    style = {"va": "center", "fontsize": _POINTS, "parse_math": False}
    middle = {"ha": "center", "va": "top", "parse_math": False}
    axis.text(width / 2, 0.1, title, color=INK, fontsize=12, **middle)
    palette = colours()
    for head, (name, shares) in enumerate(zip(names, drawn / top, strict=True)):
        down = above + head * (lines * _LINE + _GAP)
        axis.text(0.15, down + _LINE / 2, name, color=INK, weight="bold", **style)
        for word, share in zip(words, shares, strict=True):
            right = left + word.column * _LETTER
            y, wide = down + word.line * _LINE, len(word.text) * _LETTER
            colour = palette(np.ma.masked_invalid([share]))[0]
            box = (right - 0.02, y + 0.015), wide + 0.04, _LINE - 0.03
            axis.add_patch(Rectangle(*box, facecolor=colour, edgecolor="#d5d5d5", lw=0.4))
            place = {"x": right + wide / 2, "y": y + _LINE / 2, "ha": "center"}
            axis.text(s=word.text, color=ink(share), family="monospace", **place, **style)
    _add_bar(figure, palette, top, (width, height), above)
    return figure


def _add_bar(figure, palette, top, size, above) -> None:
    """Adds a bar at the right that explains the colours."""
    width, height = size
    tall = min(height - above - 0.25, 3.0)
    place = ((width - 0.85) / width, (height - above - 0.1 - tall) / height)
    axis = figure.add_axes((*place, 0.12 / width, tall / height))
    scale = ScalarMappable(Normalize(0, top), palette)
    add_scale(figure.colorbar(scale, cax=axis), "received", 9)
    axis.yaxis.get_major_locator().set_params(nbins=4)


def _strips(drawn, tokens, names, top, title) -> Figure:
    """Draws heads as rows of cells."""
    S = drawn.shape[1]
    block = math.ceil(S / _MOST_CELLS)
    starts = np.arange(0, S, block)
    means = np.add.reduceat(drawn, starts, axis=1) / np.diff(starts, append=S)
    notes = [] if block == 1 else [f"one cell: mean of {block} keys"]
    if not np.isfinite(means).all():
        notes.append("grey: not a number")
    rows, columns = (
        side(names if any(names) else [""], len(names), 1),
        side(tokens, S, block),
    )
    figure, axes = panels(
        [""], rows, columns, title=title, note="; ".join(notes), sides=("", "keys")
    )
    top = np.max(means, initial=0.0, where=np.isfinite(means)) or 1.0
    paint(figure, axes, means[None], top, "received", numbers=False)
    return figure
