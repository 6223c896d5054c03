"""Empty panels for pictures: labelled sides, and a figure large enough for all letters.

Every colour is set here, so that a picture looks the same whatever the user's defaults are.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jattn.pictures.numbers import printable

__all__ = ["INK", "Side", "kinds", "panels", "side", "wrap"]

INK = "#222222"
_PALE = "#6b6b6b"
_LETTER = 0.62 / 72  # width of a letter in inches, for each point of its size
_MOST_LETTERS = 16  # of a token, so that labels leave room for the panel
_MOST_NUMBERS = 12  # labels of a side without tokens, so that they do not overlap
_ACROSS = 4  # panels side by side, unless the caller says otherwise


class Side(NamedTuple):
    """The rows or the columns of a panel: their number and their labels."""

    cells: int
    step: int  # from one labelled cell to the next
    labels: list[str]

    @property
    def places(self) -> range:
        """Gives the cells that have a label."""
        return range(0, self.cells, self.step)


def side(tokens: Sequence[str] | None, length: int, block: int) -> Side:
    """Labels each cell if cells are tokens or few, else one cell in every few."""
    cells = math.ceil(length / block)
    step = 1
    if tokens is None or block > 1:
        steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
        step = next((x for x in steps if cells <= _MOST_NUMBERS * x), cells)
    firsts = range(0, length, step * block)
    labels = [str(first) for first in firsts]
    if tokens is not None:
        names = [printable(tokens[first], _MOST_LETTERS) for first in firsts]
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
    sides: tuple[str, str] = ("queries", "keys"),
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of empty panels: columns labelled on top, rows at the left.

    Args:
        names: What to write above each panel.
        rows: The queries, or whatever else the rows are.
        columns: The keys, or whatever else the columns are.
        title: The text above all panels.
        note: The text below all panels.
        across: How many panels stand side by side.
        below: Inches to leave free below the panels.
        sides: The names of rows and columns.

    Returns:
        The figure and its panels.
    """
    plan = _plan(names, rows, columns, title, note, across, below)
    figure = Figure(
        plan.size,
        layout="compressed" if plan.is_square else "constrained",
        facecolor="white",
    )
    axes = list(figure.subplots(plan.down, plan.across, squeeze=False).flat)
    for axis in axes[len(names) :]:
        axis.remove()
    style = {"color": _PALE, "fontsize": 9 * plan.zoom}
    for index, (axis, name) in enumerate(zip(axes, names, strict=False)):
        axis.set_aspect("equal" if plan.is_square else "auto")
        axis.set_title(name, color=INK, fontsize=11 * plan.zoom)
        _label(axis, rows, columns, plan)
        if index < plan.across:
            axis.set_xlabel(sides[1], **style)
        if index % plan.across == 0:
            axis.set_ylabel(sides[0], **style)
        else:
            axis.set_yticks([])
    _write(figure, plan)
    return figure, axes[: len(names)]


def kinds() -> list[str]:
    """Lists the file endings that matplotlib can save a figure to."""
    return sorted(Figure().canvas.get_supported_filetypes())


class _Plan(NamedTuple):
    """The layout of a figure; lengths are in inches."""

    size: tuple[float, float]  # of the figure
    across: int
    down: int
    apart: tuple[float, float]  # distances between labels of rows, and of columns
    is_square: bool  # whether each cell is
    is_turned: bool  # whether the labels of columns are turned by 90°
    zoom: float  # of titles: they grow with the figure, to be legible when it is shrunk
    title: str
    title_height: float
    note: str
    note_height: float


def _plan(names, rows: Side, columns: Side, title, note, across, below) -> _Plan:
    """Computes the room of each label, title and panel."""
    cell = _cell(rows, columns)
    width, height = max(columns.cells * cell, 1.2), max(rows.cells * cell, 0.8)
    cells = height / rows.cells, width / columns.cells
    apart = cells[0] * rows.step, cells[1] * columns.step
    left, above = _depth(rows, apart[0]), _depth(columns, apart[1])
    is_turned = above > apart[1]
    across = min(len(names), across)
    down = math.ceil(len(names) / across)
    total = max(across * (width + 0.15) + left + 1.3, 4.6)  # a legend is so wide
    zoom = max(1.0, total / 14)  # a figure of up to 14 inches keeps its letters
    title, note = wrap(title, 13 * zoom, total), wrap(note, 9 * zoom, total)
    title_height = zoom * 0.24 * len(title.splitlines()) + 0.06
    note_height = zoom * 0.17 * len(note.splitlines()) + 0.06
    above = (above if is_turned else 0.3) + zoom * (0.45 if any(names) else 0.2)
    below += title_height + note_height + 0.2
    return _Plan(
        size=(total, down * (height + above) + below),
        across=across,
        down=down,
        apart=apart,
        is_square=abs(cells[0] - cells[1]) < 1e-6,
        is_turned=is_turned,
        zoom=zoom,
        title=title,
        title_height=title_height,
        note=note,
        note_height=note_height,
    )


def _cell(rows: Side, columns: Side) -> float:
    """Chooses the size of a cell: large enough for its label, if each cell has one."""
    cells = max(rows.cells, columns.cells)
    least = 0.11 if min(rows.step, columns.step) == 1 else 0.0
    return min(max(3.6 / cells, least), 0.42)


def _points(inches: float) -> float:
    """Chooses the size of letters in points, for labels that are so far apart."""
    return min(0.85 * 72 * inches, 10.0)


def _depth(side: Side, inches: float) -> float:
    """Computes the length of the longest label in inches."""
    return max(map(len, side.labels)) * _points(inches) * _LETTER + 0.1


def _label(axis: Axes, rows: Side, columns: Side, plan: _Plan) -> None:
    """Writes the labels as plain text: a `$` in a token starts no formula."""
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xticks(columns.places, columns.labels, rotation=90 if plan.is_turned else 0)
    axis.set_yticks(rows.places, rows.labels)
    for labelled, inches in zip((axis.yaxis, axis.xaxis), plan.apart, strict=True):
        for label in labelled.get_ticklabels():
            label.set(color=INK, parse_math=False, fontsize=_points(inches))
    axis.tick_params(color=INK, length=2)
    axis.spines[:].set(color=INK, linewidth=0.5)


def _write(figure: Figure, plan: _Plan) -> None:
    """Writes title and note, and keeps the panels out of their place."""
    inch = 1 / plan.size[1]
    below, above = plan.note_height * inch, plan.title_height * inch
    # Without this rectangle, a compressed layout lets texts and panels overlap.
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, below, 1, 1 - below - above))
    style = {"color": INK, "parse_math": False}
    top, bottom = 1 - 0.06 * inch, 0.06 * inch
    if plan.title:
        figure.suptitle(plan.title, y=top, fontsize=13 * plan.zoom, **style)
    if plan.note:
        figure.supxlabel(plan.note, y=bottom, fontsize=9 * plan.zoom, **style)


def wrap(text, size: float, inches: float) -> str:
    """Breaks what a text or any other object says into lines that fit the width."""
    text = "" if text is None else str(text)
    return textwrap.fill(text, max(int(inches / (size * _LETTER)), 10))
