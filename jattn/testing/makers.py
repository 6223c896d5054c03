"""Makers of inputs: functions of the sizes and of a NumPy generator."""

import numpy as np

from jattn.arrays.shapes import Sizes


def _normal(*letters: str):
    """Gives a maker of normal numbers; each letter names a size, and "1" is size 1."""

    def make(sizes: Sizes, rng: np.random.Generator):
        size = lambda letter: 1 if letter == "1" else getattr(sizes, letter)
        return rng.standard_normal([size(letter) for letter in letters])

    return make


def _ids(letter: str, count: int = 3):
    """Gives a maker of sorted ids 0 … count − 1, drawn anew for each example."""

    def make(sizes: Sizes, rng: np.random.Generator):
        shape = (*sizes.batch, getattr(sizes, letter))
        return np.sort(rng.integers(0, count, shape), axis=-1).astype(np.int32)

    return make


def _lengths(letter: str):
    """Gives a maker of a length for each example; the first one is 0."""

    def make(sizes: Sizes, rng: np.random.Generator):
        longest = getattr(sizes, letter)
        lengths = rng.integers(0, longest + 1, sizes.B)
        lengths[:1] = 0  # an empty example, where implementations easily fail
        return lengths.reshape(sizes.batch).astype(np.int32)

    return make


def _booleans(sizes: Sizes, rng: np.random.Generator):
    return rng.random((*sizes.batch, 1, sizes.T, sizes.S)) < 0.6


def _infinite_bias(sizes: Sizes, rng: np.random.Generator):
    bias = rng.standard_normal((*sizes.batch, 1, sizes.T, sizes.S))
    bias[..., rng.random(bias.shape[-2:]) < 0.4] = -np.inf
    bias[..., :1, :] = -np.inf  # a row that sees nothing
    return bias


def _fixed(array):
    return lambda sizes, rng: np.asarray(array)
