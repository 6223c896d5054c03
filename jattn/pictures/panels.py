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

from jattn.pictures.numbers import printable

__all__ = ["INK", "Side", "kinds", "panels", "side", "wrap"]

INK = "#222222"
_PALE = "#6b6b6b"
_LETTER = 0.62 / 72  # inches that a letter is wide, for each point of its size
_MOST_LETTERS = 16  # of a token
_MOST_NUMBERS = 12  # of a side without tokens
_ACROSS = 4


class Side(NamedTuple):
    """The rows or the columns of a panel: how many cells, and what is written where."""

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
        rows: The queries, or what else goes downwards.
        columns: The keys, or what else goes to the right.
        title: What to write above all.
        note: What to write below all.
        across: How many panels stand side by side.
        below: Inches to leave for what else is to stand below.
        sides: What rows and columns are called.

    Returns:
        The figure and its panels.
    """
    plan = _plan(names, rows, columns, title or "", note, across, below)
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
    """The endings of the files that a figure can be saved to."""
    return sorted(Figure().canvas.get_supported_filetypes())


class _Plan(NamedTuple):
    """Where everything goes, in inches."""

    size: tuple[float, float]  # of the figure
    across: int
    down: int
    apart: tuple[float, float]  # the labels of rows, and those of columns
    is_square: bool  # each cell
    is_turned: bool  # each label of a column
    zoom: float  # of letters that a slide must not lose
    title: str
    title_height: float
    note: str
    note_height: float


def _plan(names, rows: Side, columns: Side, title, note, across, below) -> _Plan:
    """Gives each label, title and panel its room."""
    cell = _cell(rows, columns)
    width, height = max(columns.cells * cell, 1.2), max(rows.cells * cell, 0.8)
    cells = height / rows.cells, width / columns.cells
    apart = cells[0] * rows.step, cells[1] * columns.step
    left, above = _depth(rows, apart[0]), _depth(columns, apart[1])
    is_turned = above > apart[1]
    across = min(len(names), across)
    down = math.ceil(len(names) / across)
    total = max(across * (width + 0.15) + left + 1.3, 4.6)  # a legend is so wide
    zoom = max(1.0, total / 14)
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
    """How large a cell is: room for the letters of its label, if each has one."""
    cells = max(rows.cells, columns.cells)
    least = 0.11 if min(rows.step, columns.step) == 1 else 0.0
    return min(max(3.6 / cells, least), 0.42)


def _points(inches: float) -> float:
    """The size of letters for labels that are so far apart."""
    return min(0.85 * 72 * inches, 10.0)


def _depth(side: Side, inches: float) -> float:
    """How far the longest label reaches."""
    return max(map(len, side.labels)) * _points(inches) * _LETTER + 0.1


def _label(axis: Axes, rows: Side, columns: Side, plan: _Plan) -> None:
    """Writes the labels, as they are: no token is taken for a formula."""
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
    """Writes what stands above and below all panels, and keeps these from it."""
    inch = 1 / plan.size[1]
    below, above = plan.note_height * inch, plan.title_height * inch
    # Left to itself, a compressed layout moves these texts and the panels into each other.
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, below, 1, 1 - below - above))
    style = {"color": INK, "parse_math": False}
    top, bottom = 1 - 0.06 * inch, 0.06 * inch
    if plan.title:
        figure.suptitle(plan.title, y=top, fontsize=13 * plan.zoom, **style)
    if plan.note:
        figure.supxlabel(plan.note, y=bottom, fontsize=9 * plan.zoom, **style)


def wrap(text: str, size: float, inches: float) -> str:
    """The text in as many lines as it takes."""
    return textwrap.fill(text, max(int(inches / (size * _LETTER)), 10))
