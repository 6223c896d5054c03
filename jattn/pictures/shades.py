"""Numbers as shades and bars, and tokens as labels, in the letters of a terminal."""

import math

import numpy as np

from jattn.pictures.numbers import printable

_SHADES = " ░▒▓█"
_HEIGHTS = " ▁▂▃▄▅▆▇█"
_MOST_LETTERS = 12  # of a token; longer labels would leave too little room for the cells


def labels_of(tokens, length: int) -> list[str]:
    """Gives a label for each token, in printable letters."""
    if tokens is None:
        return [str(place) for place in range(length)]
    return [printable(token, _MOST_LETTERS) or "·" for token in tokens]


def upright(labels: list[str], repeat: int) -> list[str]:
    """Writes labels downwards, each above its column."""
    height = max(map(len, labels))
    labels = [label.rjust(height) for label in labels]
    lines = ("".join(x[i].ljust(repeat) for x in labels) for i in range(height))
    return [line.rstrip() for line in lines]


def line_ends(labels: list[str], width: int):
    """Gives the index of the first label of each line and the index after its last."""
    start, used = 0, 0
    for place, label in enumerate(labels):
        if used and used + len(label) > width:
            yield start, place
            start, used = place, 0
        used += len(label) + 1
    yield start, len(labels)


def largest(array: np.ndarray) -> float:
    """Gives the largest number that is finite; 0 where there is none."""
    return float(np.max(array, initial=0.0, where=np.isfinite(array)))


def as_shares(array: np.ndarray) -> np.ndarray:
    """Gives numbers as shares of the largest one."""
    return array / (largest(array) or 1.0)


def legend(what: str, array: np.ndarray) -> str:
    """Writes what the shades mean."""
    shades = "░ 0.1–0.3  ▒ 0.3–0.5  ▓ 0.5–0.7  █ 0.7–1"
    note = "" if np.isfinite(array).all() else "  ? NaN"
    return f"{what}, shares of {largest(array):.2f}: {shades}{note}"


def shade(share: float) -> str:
    """Gives the letter whose shade is this share of the largest number."""
    # Five shades: the limits between them are 0.1, 0.3, 0.5 and 0.7, as in the legend.
    return _SHADES[min(int(5 * max(share, 0) + 0.5), 4)] if math.isfinite(share) else "?"


def bar(share: float) -> str:
    """Gives the letter whose height is this share of the largest number."""
    return _HEIGHTS[round(8 * max(share, 0))] if math.isfinite(share) else "?"
