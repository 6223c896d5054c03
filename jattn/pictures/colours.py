"""Colours in panels, and what they mean: one scale for all panels of a figure."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from jattn.pictures.panels import INK

__all__ = ["add_scale", "colours", "ink", "paint"]


def colours() -> Colormap:
    """Gives the colours, from almost white to dark; NaN is grey."""
    return matplotlib.colormaps["BuPu"].with_extremes(bad="#9a9a9a")


def ink(share: float) -> str:
    """Gives the colour of letters that can be read on the colour of a share of the top."""
    return "white" if share > 0.5 else INK


def paint(
    figure: Figure, axes: list[Axes], drawn: np.ndarray, top: float, label: str, *, numbers
) -> None:
    """Fills each panel with colours from 0 to `top`, and adds a bar that explains them.

    `numbers` says whether to write each number into its cell.
    """
    style = {"cmap": colours(), "vmin": 0, "vmax": top, "aspect": axes[0].get_aspect()}
    images = [axis.imshow(x, **style) for x, axis in zip(drawn, axes, strict=True)]
    if numbers:
        for panel, axis in zip(drawn, axes, strict=True):
            _write_numbers(axis, panel, top)
    bar = figure.colorbar(images[0], ax=axes, aspect=30, pad=0.02)
    add_scale(bar, label, float(axes[0].title.get_fontsize()))


def add_scale(bar, label: str, size: float) -> None:
    """Labels the bar that explains the colours."""
    bar.set_label(label, color=INK, fontsize=size)
    bar.ax.tick_params(colors=INK, labelsize=0.85 * size)
    bar.outline.set(edgecolor=INK, linewidth=0.5)


def _write_numbers(axis: Axes, panel: np.ndarray, top: float) -> None:
    """Writes each number into its cell, unless it would round to .00."""
    for (row, column), number in np.ndenumerate(panel):
        if number >= 0.005:  # rounds to .01; from 9.995 on there is no room for decimals
            text = f"{number:.2f}".removeprefix("0") if number < 9.995 else f"{number:.0f}"
            style = {"color": ink(number / top), "fontsize": 7}
            axis.text(column, row, text, ha="center", va="center", **style)
