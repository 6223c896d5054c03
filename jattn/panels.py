"""Empty panels for pictures: labelled sides, and a figure large enough for all letters.

Every colour is set here, so that a picture looks the same whatever the user's defaults.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["INK", "Side", "kinds", "panels", "side"]

INK = "#222222"
_PALE = "#6b6b6b"
_LETTER = 0.62 / 72  # inches that a letter is wide, for each point of its size
_MOST_LETTERS = 16  # of a token
_MOST_NUMBERS = 12  # of a side without tokens
_ACROSS = 4


class Side(NamedTuple):
    """The queries or the keys of a panel: how many cells, and what is written where."""

    cells: int
    step: int  # from one labelled cell to the next
    labels: list[str]

    @property
    def places(self) -> range:
        """The cells that are labelled."""
        return range(0, self.cells, self.step)


def side(tokens: Sequence[str] | None, length: int, block: int) -> Side:
    """Labels each cell if cells are tokens or few, and otherwise every so many."""
    cells = math.ceil(length / block)
    step = 1
    if tokens is None or block > 1:
        steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
        step = next((x for x in steps if cells <= _MOST_NUMBERS * x), cells)
    firsts = range(0, length, step * block)
    labels = [str(first) for first in firsts]
    if tokens is not None:
        names = [_printable(tokens[first]) for first in firsts]
        pairs = zip(labels, names, strict=True)
        labels = names if block == 1 else [" ".join(pair) for pair in pairs]
    return Side(cells, step, labels)


def panels(
    names: Sequence[str],
    rows: Side,
    columns: Side,
    *,
    title: str | None = None,
    note: str = "",
    across: int = _ACROSS,
    below: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of empty panels: keys on top, queries at the left.

    Args:
        names: What to write above each panel.
        rows: The queries.
        columns: The keys.
        title: What to write above all.
        note: What to write below all.
        across: How many panels stand side by side.
        below: Inches to leave for what else is to stand below.

    Returns:
        The figure and its panels.
    """
    cell = _cell(rows, columns)
    width, height = max(columns.cells * cell, 1.2), max(rows.cells * cell, 0.8)
    is_square = abs(width / columns.cells - height / rows.cells) < 1e-6
    apart = height / rows.cells * rows.step, width / columns.cells * columns.step
    left, above = _depth(rows, apart[0]), _depth(columns, apart[1])
    is_turned = above > apart[1]
    above = above if is_turned else 0.3
    across = min(len(names), across)
    down = math.ceil(len(names) / across)
    total = max(across * (width + 0.15) + left + 1.3, 3.0)
    zoom = max(1.0, total / 14)  # for letters that a slide must not lose
    above += zoom * (0.45 if any(names) else 0.2)
    title, note = _wrap(title or "", 13 * zoom, total), _wrap(note, 9 * zoom, total)
    lines = zoom * 0.24 * len(title.splitlines()) + 0.06
    below += lines + zoom * (0.2 * len(note.splitlines()) + 0.2)
    figure = Figure(
        (total, down * (height + above) + below),
        layout="compressed" if is_square else "constrained",
        facecolor="white",
    )
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(names) :]:
        axis.remove()
    for index, (axis, name) in enumerate(zip(axes, names, strict=False)):
        axis.set_aspect("equal" if is_square else "auto")
        _label(axis, rows, columns, apart, is_turned)
        axis.set_title(name, color=INK, fontsize=11 * zoom)
        if index < across:
            axis.set_xlabel("keys", color=_PALE, fontsize=9 * zoom)
        if index % across:
            axis.set_yticks([])
        else:
            axis.set_ylabel("queries", color=_PALE, fontsize=9 * zoom)
    if title:
        # Left to itself, a compressed layout moves a long title into the panels.
        inch = 1 / figure.get_figheight()
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(rect=(0, 0, 1, 1 - lines * inch))
        figure.suptitle(
            title, y=1 - 0.06 * inch, fontsize=13 * zoom, color=INK, parse_math=False
        )
    if note:
        figure.supxlabel(note, fontsize=9 * zoom, color=INK, parse_math=False)
    return figure, axes[: len(names)]


def kinds() -> list[str]:
    """The endings of the files that a figure can be saved to."""
    return sorted(Figure().canvas.get_supported_filetypes())


def _cell(rows: Side, columns: Side) -> float:
    """Inches of a cell: room for the letters of its label, if each has one."""
    cells = max(rows.cells, columns.cells)
    least = 0.11 if min(rows.step, columns.step) == 1 else 0.0
    return min(max(3.6 / cells, least), 0.42)


def _points(inches: float) -> float:
    """The size of letters for labels that are so far apart."""
    return min(0.85 * 72 * inches, 10.0)


def _depth(side: Side, inches: float) -> float:
    """How far the longest label reaches, in inches."""
    return max(map(len, side.labels)) * _points(inches) * _LETTER + 0.1


def _label(axis: Axes, rows: Side, columns: Side, apart, is_turned: bool) -> None:
    """Writes the labels, as they are: no token is taken for a formula."""
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xticks(columns.places, columns.labels, rotation=90 if is_turned else 0)
    axis.set_yticks(rows.places, rows.labels)
    for side, inches in zip((axis.yaxis, axis.xaxis), apart, strict=True):
        for label in side.get_ticklabels():
            label.set(color=INK, parse_math=False, fontsize=_points(inches))
    axis.tick_params(color=INK, length=2)
    axis.spines[:].set(color=INK, linewidth=0.5)


def _wrap(text: str, size: float, inches: float) -> str:
    """The text in as many lines as it takes."""
    return textwrap.fill(text, max(int(inches / (size * _LETTER)), 10))


def _printable(token: str) -> str:
    """A token in letters that can be seen, and not too many of them."""
    token = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(token))
    return token if len(token) <= _MOST_LETTERS else token[: _MOST_LETTERS - 1] + "…"
