"""Two pictures of a run: how the loss fell, and which words a chosen word attends to."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from examples.language_model.checkpoints import History

INK, PALE = "#222222", "#b8c4d6"
COLOURS = "BuPu"  # of weights, as in `jattn.plot`
LETTER, LINE = 0.095, 0.24  # inches that a letter is wide, and a line high


def loss_curve(history: History, bytes_per_token: float) -> Figure:
    """Draws the loss of each step, its running mean, and the validation loss.

    Args:
        history: The losses, in nats per token.
        bytes_per_token: Of the validation text: the right axis is in bits per byte.
    """
    figure = Figure((7.2, 4.0), layout="constrained", facecolor="white")
    axis = figure.subplots()
    step = np.arange(1, history.done + 1)
    train, validation = (x[: history.done] for x in (history.train, history.validation))
    axis.plot(step, train, color=PALE, lw=0.8, label="training, each row")
    axis.plot(
        step,
        running_mean(train, 20),
        color="#1f4e79",
        lw=1.8,
        label="training, mean of 20 steps",
    )
    judged = np.isfinite(validation)
    style = {"color": "#b4460f", "marker": "o", "lw": 1.2, "ms": 5}
    axis.plot(step[judged], validation[judged], label="validation documents", **style)
    if judged.any():
        last = validation[judged][-1]
        axis.annotate(
            f"{last:.2f}",
            (step[judged][-1], last),
            (0, 9),
            textcoords="offset points",
            color=style["color"],
            ha="center",
        )
    axis.set(xlabel="step", ylabel="loss, nats per token", xlim=(0, history.steps * 1.03))
    bits = bytes_per_token * np.log(2)
    right = axis.secondary_yaxis(
        "right", functions=(lambda x: x / bits, lambda x: x * bits)
    )
    right.set_ylabel("bits per byte", color=INK)
    right.tick_params(colors=INK)
    axis.grid(color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    _ink(axis)
    axis.legend(frameon=False, labelcolor=INK)
    return figure


def running_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Averages, at each place, the last so many values, or all that there are."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - count, 0)
    return (total[end] - total[start]) / (end - start)


def attended(
    pieces: Sequence[str],
    weights: np.ndarray,
    names: Sequence[str],
    title: str,
    note: str,
) -> Figure:
    """Draws a text once for each head, each token as dark as the weight it gets.

    Args:
        pieces: The tokens as text; the last is the one that attends, and has a frame.
        weights: For each head, of each token.
        names: What the heads are called.
        title: What to write above.
        note: What to write below.

    Returns:
        The figure; all heads have one scale of colours.
    """
    places, lines = lay_out(pieces)
    letters = max(column + len(text) for _, column, text, _ in places)
    across = 2 if len(names) > 1 else 1
    down = -(-len(names) // across)
    size = across * (letters * LETTER + 0.35) + 1.0, down * (lines * LINE + 0.45) + 1.1
    figure = Figure(size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    scale = PowerNorm(0.5, 0.0, float(np.max(weights)) or 1.0)  # small ones are seen too
    shades = ScalarMappable(scale, COLOURS)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name, each in zip(axes, names, weights, strict=False):
        axis.set(xlim=(-0.5, letters + 0.5), ylim=(lines + 0.1, -0.1))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set(color="#cccccc", linewidth=0.6)
        axis.set_title(name, color=INK, fontsize=11)
        for line, column, text, token in places:
            _write(
                axis,
                line,
                column,
                text,
                shades.to_rgba(each[token]),
                token == len(pieces) - 1,
            )
    bar = figure.colorbar(shades, ax=axes[: len(names)], aspect=30, pad=0.015)
    bar.set_label("weight (scale of square roots)", color=INK)
    bar.ax.tick_params(colors=INK)
    figure.suptitle(title, color=INK, fontsize=13, parse_math=False)
    figure.supxlabel(note, color=INK, fontsize=9, parse_math=False)
    return figure


def lay_out(pieces: Sequence[str]) -> tuple[list[tuple[int, int, str, int]], int]:
    """Places each part of a text, all letters equally wide; ↵ ends a line.

    Returns:
        (line, column, text, token) of each part, for a token may go over several lines; and
        how many lines there are.
    """
    places, line, column = [], 0, 0
    for token, piece in enumerate(pieces):
        for part in re.split("(\n)", piece):
            if part == "\n":
                places.append((line, column, "↵", token))
                line, column = line + 1, 0
            elif part:
                places.append((line, column, part, token))
                column += len(part)
    return places, line + 1


def _write(axis: Axes, line: int, column: int, text: str, colour, is_query: bool) -> None:
    """Writes a token into its box."""
    frame = {"edgecolor": "#b4460f", "lw": 2.0, "zorder": 3} if is_query else {"lw": 0}
    axis.add_patch(Rectangle((column, line), len(text), 0.92, facecolor=colour, **frame))
    is_dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55
    axis.text(
        column,
        line + 0.68,
        text,
        family="monospace",
        parse_math=False,
        fontsize=LETTER * 72 / 0.602,
        color="white" if is_dark else INK,
        zorder=4,
    )


def _ink(axis: Axes) -> None:
    axis.tick_params(colors=INK)
    axis.spines[:].set(color="#999999", linewidth=0.6)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(INK)
