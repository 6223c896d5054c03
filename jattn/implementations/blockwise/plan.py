"""How much a tile holds: by the sizes of a call, and by what its mask leaves out."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jattn.blocks import of_call
from jattn.call.problem import Operands, Problem


class Plan(NamedTuple):
    """How much a tile holds."""

    B: int  # examples
    K: int  # key/value heads
    G: int  # query heads for each of these: all
    T: int  # queries
    S: int  # keys
    folded: bool = False  # whether the forward pass takes heads as one

    @property
    def N(self) -> int:
        """Query heads."""
        return self.K * self.G


# With as few rows to a key/value head, reading the keys is what takes time.
FEW_ROWS = 8


# How many queries and keys a tile has, at most, measured on XLA's CPU: large tiles are
# faster, by this much a pair, and small ones leave out more of what a mask hides.
COARSE, FINE = 1024, 512
FINE_COST = 1.25


def granularity(problem: Problem, operands: Operands | None) -> int:
    """COARSE or FINE, by what is left to visit under a mask that reads no arrays."""
    if problem.size is not None:
        return problem.size
    if problem.mask is None:
        return COARSE
    if operands is None or not problem.sizes.are_known:
        return FINE
    if not _has_known_numbers(operands):
        return FINE
    alone = dataclasses.replace(problem, modifier=None), operands._replace(bias=None)
    coarse, fine = (
        np.mean(of_call.block_table(*alone, *tile) != of_call.EMPTY)
        for tile in (tile_sizes(problem, COARSE), tile_sizes(problem, FINE))
    )
    return COARSE if coarse <= fine * FINE_COST else FINE


def decided(problem: Problem, operands: Operands) -> Problem:
    """The problem with the size of its tiles, where the mask's numbers are known.

    Inside `jit` they are not, for they are operands.
    """
    if problem.mask is None or not problem.sizes.are_known:
        return problem
    if 0 in (*problem.sizes.BNTS, problem.sizes.K) or not _has_known_numbers(operands):
        return problem
    return dataclasses.replace(problem, size=granularity(problem, operands))


def _has_known_numbers(operands: Operands) -> bool:
    """Whether all that decides what is skipped are numbers of Python or NumPy."""
    where = operands.query_position, operands.key_position
    arrays = jax.tree.leaves((operands.mask, where))
    return operands.kinds is None and all(
        isinstance(x, np.ndarray | np.generic) and x.size == 1 for x in arrays
    )


def tile_sizes(problem: Problem, size: int) -> tuple[int, int]:
    """How many queries and keys are skipped at once."""
    rule = plan(problem, spread=False, size=size)
    return rule.T, rule.S


def plan(
    problem: Problem, spread: bool, size: int, tile: tuple[int, int] | None = None
) -> Plan:
    """The sizes of tiles, by those of the problem; `tile` overrides queries and keys."""
    sizes = problem.sizes
    if tile is not None:
        return Plan(1, 1, sizes.G, min(tile[0], sizes.T), min(tile[1], sizes.S))
    if not sizes.are_known:
        return Plan(1, 1, sizes.G, 256, 512)
    T = _even(sizes.T, max(size // sizes.G, 1))
    S = _even(sizes.S, size, 64)
    if spread:  # all examples and heads, for a loop over them would cut a divided axis
        return Plan(sizes.B, sizes.K, sizes.G, T, S)
    if sizes.G * sizes.T <= FEW_ROWS and sizes.K > 1:
        K = _divisor(sizes.K, 64 // (sizes.G * sizes.T))
        # To cut keys is to copy them, which takes longer than to read them.
        S = sizes.S if problem.mask is None else _even(sizes.S, 8192)
        B = sizes.B if K == sizes.K else 1
        return Plan(B, K, sizes.G, T, S, folded=True)
    fit = max(1, 2**19 // (T * S * sizes.G))
    K = _divisor(sizes.K, fit)
    B = _divisor(sizes.B, fit // K) if K == sizes.K else 1
    return Plan(B, K, sizes.G, T, S)


def rows_plan(problem: Problem) -> Plan:
    """Tiles of whole rows: few enough that they stay small."""
    sizes = problem.sizes
    if not sizes.are_known:
        return Plan(sizes.B, sizes.K, sizes.G, 16, sizes.S)
    row = sizes.B * sizes.N * sizes.S
    return Plan(sizes.B, sizes.K, sizes.G, _even(sizes.T, max(1, 2**20 // row)), sizes.S)


def _even(length: int, block: int, multiple: int = 16) -> int:
    """The size of blocks, at most `block` or so, that leaves the last nearly full."""
    count = -(-length // block)
    size = -(-length // count)
    return size if count == 1 else -(-size // multiple) * multiple


def _divisor(number: int, most: int) -> int:
    return max(x for x in range(1, number + 1) if number % x == 0 and x <= max(most, 1))
