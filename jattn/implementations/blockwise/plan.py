"""How much a tile holds, from the sizes of a call and from what its mask leaves out."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jattn.arrays import are_numbers
from jattn.blocks import of_call
from jattn.call.problem import Operands, Problem


class Plan(NamedTuple):
    """Sizes of a tile."""

    B: int  # examples
    K: int  # key/value heads
    G: int  # query heads for each key/value head: always all of them
    T: int  # queries
    S: int  # keys
    folded: bool = False  # whether the forward pass multiplies all heads in one product

    @property
    def N(self) -> int:
        """Counts the query heads of a tile."""
        return self.K * self.G


# With at most so many rows for each key/value head, most time goes into reading the keys.
FEW_ROWS = 8


# The largest number of queries and of keys in a tile, measured on XLA:CPU. A pair costs
# FINE_COST times as much in small tiles as in large ones, but small tiles skip more of
# what a mask hides.
COARSE, FINE = 1024, 512
FINE_COST = 1.25


def granularity(problem: Problem, operands: Operands | None) -> int:
    """Chooses COARSE tiles, unless FINE ones skip enough to pay for their overhead.

    The overhead is FINE_COST. What a mask skips is known only if it reads no arrays; with
    another mask the choice is FINE.
    """
    if problem.size is not None:
        return problem.size
    if problem.mask is None:
        return COARSE
    if operands is None or not problem.sizes.are_known:
        return FINE
    if not _has_known_numbers(operands):
        return FINE
    # Only the mask decides here: a modifier or a bias may read traced arrays.
    alone = dataclasses.replace(problem, modifier=None), operands._replace(bias=None)
    coarse, fine = (
        np.mean(of_call.block_table(*alone, *tile) != of_call.EMPTY)
        for tile in (tile_sizes(problem, COARSE), tile_sizes(problem, FINE))
    )
    return COARSE if coarse <= fine * FINE_COST else FINE


def decided(problem: Problem, operands: Operands) -> Problem:
    """Adds the size of tiles to a problem, if the numbers of its mask are known.

    Inside `jit` they are not known, since there they are operands.
    """
    if problem.mask is None or not problem.sizes.are_known:
        return problem
    if 0 in (*problem.sizes.BNTS, problem.sizes.K) or not _has_known_numbers(operands):
        return problem
    return dataclasses.replace(problem, size=granularity(problem, operands))


def _has_known_numbers(operands: Operands) -> bool:
    """Says whether mask and positions, which decide what is skipped, are known numbers."""
    where = operands.query_position, operands.key_position
    return operands.kinds is None and are_numbers((operands.mask, where))


def tile_sizes(problem: Problem, size: int) -> tuple[int, int]:
    """Gives the number of queries and of keys in a tile, the unit of skipping."""
    rule = plan(problem, spread=False, size=size)
    return rule.T, rule.S


def plan(
    problem: Problem, spread: bool, size: int, tile: tuple[int, int] | None = None
) -> Plan:
    """Chooses the sizes of tiles from those of the problem.

    `tile`, if given, overrides the number of queries and of keys.
    """
    sizes = problem.sizes
    if tile is not None:
        return Plan(1, 1, sizes.G, min(tile[0], sizes.T), min(tile[1], sizes.S))
    if not sizes.are_known:  # fixed tiles: nothing can be fitted to a symbolic length
        return Plan(1, 1, sizes.G, 256, 512)
    T = _even(sizes.T, max(size // sizes.G, 1))
    S = _even(sizes.S, size, 64)
    if spread:  # all examples and heads: a loop would cut axes that devices divide
        return Plan(sizes.B, sizes.K, sizes.G, T, S)
    if sizes.G * sizes.T <= FEW_ROWS and sizes.K > 1:
        K = _divisor(sizes.K, 64 // (sizes.G * sizes.T))
        # Cutting keys copies them, which takes longer than reading them. So keys stay
        # whole; with a mask, large blocks of 8192 still let empty blocks be skipped.
        S = sizes.S if problem.mask is None else _even(sizes.S, 8192)
        B = sizes.B if K == sizes.K else 1
        return Plan(B, K, sizes.G, T, S, folded=True)
    # If tiles are small, several heads and examples share one, up to 2¹⁹ logits.
    fit = max(1, 2**19 // (T * S * sizes.G))
    K = _divisor(sizes.K, fit)
    B = _divisor(sizes.B, fit // K) if K == sizes.K else 1
    return Plan(B, K, sizes.G, T, S)


def rows_plan(problem: Problem) -> Plan:
    """Chooses tiles of whole rows: so many rows that a tile has about 2²⁰ logits."""
    sizes = problem.sizes
    if not sizes.are_known:
        return Plan(sizes.B, sizes.K, sizes.G, 16, sizes.S)
    row = sizes.B * sizes.N * sizes.S
    return Plan(sizes.B, sizes.K, sizes.G, _even(sizes.T, max(1, 2**20 // row)), sizes.S)


def _even(length: int, block: int, multiple: int = 16) -> int:
    """Chooses the size of blocks, about `block` at most, so that all are nearly full.

    If there are several blocks, their size is a multiple of `multiple`.
    """
    count = -(-length // block)
    size = -(-length // count)
    return size if count == 1 else -(-size // multiple) * multiple


def _divisor(number: int, most: int) -> int:
    return max(x for x in range(1, number + 1) if number % x == 0 and x <= max(most, 1))
