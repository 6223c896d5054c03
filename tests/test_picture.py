"""A mask in blocks, pooled weights, and both as text."""

import numpy as np
import pytest

from jattn.masks import Causal, Prefix, Window
from jattn.pictures import numbers
from jattn.pictures.numbers import EMPTY, FULL, PARTIAL


def test_allowed_is_the_mask():
    expected = np.tril(np.ones((4, 6), bool), 1)
    np.testing.assert_array_equal(numbers.allowed(Causal(1), 4, 6), expected)


def test_allowed_takes_functions_and_arrays():
    array = np.arange(12).reshape(3, 4) % 2 == 0
    function = lambda b, n, t, s: (4 * t + s) % 2 == 0
    np.testing.assert_array_equal(numbers.allowed(array, 3, 4), array)
    np.testing.assert_array_equal(numbers.allowed(function, 3, 4), array)


def test_allowed_of_some_rows_is_these_rows():
    rows = np.array([5, 0])
    every = numbers.allowed(Window(2, 0), 6)
    np.testing.assert_array_equal(numbers.allowed(Window(2, 0), 6, rows=rows), every[rows])


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (4, 30), (40, 40)])
def test_cell_is_full_or_empty_or_partial_as_its_pairs_are(monkeypatch, block, at_once):
    monkeypatch.setattr(numbers, "_PAIRS_AT_ONCE", at_once)
    mask = Causal() & Window(5, 0) | Prefix(3)
    pairs = numbers.allowed(mask, 17, 23)
    expected = [
        [
            FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            for tile in np.array_split(strip, range(block[1], 23, block[1]), axis=1)
        ]
        for strip in np.array_split(pairs, range(block[0], 17, block[0]))
    ]
    np.testing.assert_array_equal(numbers.cells(mask, 17, 23, block), expected)


def test_pooled_weights_still_add_up_to_one():
    weights = np.random.default_rng(0).dirichlet(np.ones(11), size=(2, 7))
    pooled = numbers.pool(weights, (3, 4))
    assert pooled.shape == (2, 3, 3)
    np.testing.assert_allclose(pooled.sum(-1), 1)
    np.testing.assert_allclose(pooled[0, 2, 1], weights[0, 6, 4:8].sum())


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, ""), (0.5, "██"), (0.28, "█▏"), (1, "████"), (2, "████")]
)
def test_bar_is_as_long_as_its_share(share, drawn):
    assert numbers.bar(share, 4) == drawn


def test_grid_draws_one_line_per_row():
    cells = np.array([[2, 1, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0]])
    assert numbers.grid(cells, (8, 4), width=9) == [
        "  0    20",
        "0 █░····",
        "8 ·█░···",
    ]


def test_grid_is_twice_as_wide_where_that_fits():
    assert numbers.grid(np.array([[2, 0]]), (1, 1), width=80) == ["  0", "0 ██··"]
