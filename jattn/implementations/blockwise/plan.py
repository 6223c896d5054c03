"""How much a tile holds, from the sizes of a call and from what its mask leaves out."""

import dataclasses
from typing import Any, NamedTuple

from jattn.call.problem import Problem


class Plan(NamedTuple):
    """Sizes of a tile."""

    B: int  # examples
    K: int  # key/value heads
    G: int  # query heads for each key/value head: always all of them
    T: int  # queries
    S: int  # keys
    folded: bool = False  # whether the forward pass multiplies all heads in one product
    cuts: int = 1  # how many cells a partial tile has along each side; a row is a strip
    flat: bool = False  # whether one loop visits the tiles of all blocks, as on a GPU
    banded: bool = False  # whether a window's numbers alone say which tiles are visited

    @property
    def N(self) -> int:
        """Counts the query heads of a tile."""
        return self.K * self.G

    @property
    def cell(self) -> tuple[Any, Any]:
        """Gives the number of queries and of keys in a cell, the unit of the table."""
        if self.cuts == 1:
            return self.T, self.S
        # Where there are several blocks of keys, they can be cut evenly. The last cell of a
        # single one may be smaller.
        return self.T // self.cuts, -(-self.S // self.cuts)

    def halved(self) -> "Plan":
        """Gives the plan for what computes partial tiles whole: its tiles are smaller."""
        if self.cuts == 1:
            return self
        return self._replace(T=self.T // 2, S=-(-self.S // 2), cuts=1)


# With at most so many rows for each key/value head, most time goes into reading the keys.
FEW_ROWS = 8


# The most queries and keys in a tile, measured on XLA:CPU: large products run near the peak
# of a processor, and the logits of a tile, 4 MB in float32, stay in a shared cache.
MOST = 1024
# How many strips of queries a partial tile is cut into, and into how many cells each strip;
# but no cell has fewer than FEWEST rows or keys. Four strips compute less in vain, but took
# as long as two (causal, T from 1024 to 4096, Zen 5), and longer to compile.
CUTS, FEWEST = 2, 384


# How long a pair takes in a tile of so many queries and keys, by the time in 512 × 512: the
# mean of forward and gradients, 8 heads of 64 at T = 4096 on Zen 5.
PAIR = {64: 3.2, 128: 2.2, 256: 1.55, 512: 1.0}


# The names of GPUs; "export" is one of NVIDIA, see `Operation.on`.
GPUS = ("gpu", "cuda", "rocm", "export")
# The most logits in a tile of a GPU, 64 MB in float32. Each step of a tile is a kernel that
# takes some µs to launch. On an H200, causal attention of 16 heads and T = 4096 takes 1.26
# ms with so many, 1.90 with a quarter of them, which fits the cache, and 1.26 with four
# times as many.
GPU_LOGITS = 2**24


def flat_logits(platform: str) -> int:
    """Gives the most logits in a tile where one loop visits all tiles; 0 on a CPU or TPU.

    On a GPU the host launches a kernel for each step of a loop. Where the program computes
    how many turns the loop has, the host waits for this number in each of them. So there
    is one loop with large tiles, rather than two loops for each block.
    """
    return GPU_LOGITS if platform in GPUS else 0


def plan(
    problem: Problem,
    spread: bool,
    tile: tuple[int, int] | None = None,
    flat: int = 0,
) -> Plan:
    """Chooses the sizes of tiles from those of the problem.

    `tile`, if given, overrides the number of queries and of keys. `flat`, if not 0, asks
    for the tiles of a GPU with so many logits at most.
    """
    sizes = problem.sizes
    if flat and sizes.are_known:
        return _gpu_plan(problem, spread, tile, flat)
    if tile is not None:
        T, S = min(tile[0], sizes.T), min(tile[1], sizes.S)
        is_even = problem.mask is not None and T % CUTS == S % CUTS == 0
        return Plan(1, 1, sizes.G, T, S, cuts=CUTS if is_even else 1)
    if not sizes.are_known:  # fixed tiles: nothing can be fitted to a symbolic length
        fit = lambda length, most: min(length, most) if isinstance(length, int) else most
        return Plan(1, 1, sizes.G, fit(sizes.T, 256), fit(sizes.S, 512))
    side = MOST if problem.near is None or spread else banded_side(*problem.near)
    if 2 * side < min(sizes.T, sizes.S, MOST):
        return _banded_plan(problem, side)
    T, cuts = max(MOST // sizes.G, 1), 1
    if problem.mask is not None and not spread:
        rows, columns = sizes.G * min(sizes.T, T), min(sizes.S, MOST)
        cuts = CUTS if min(rows, columns) >= CUTS * FEWEST and T >= CUTS else 1
    T = -(-_even(sizes.T, T, 16 * cuts) // cuts) * cuts
    S = _even(sizes.S, MOST, 64 * cuts)
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
    return Plan(B, K, sizes.G, T, S, cuts=cuts)


def without_bands(problem: Problem, **options) -> Plan:
    """Chooses the tiles that the mask has a table for, also where a window has a band."""
    return plan(dataclasses.replace(problem, near=None), **options)


def run_length(length: int, block: int, before: int, after: int) -> int:
    """Says how many blocks hold all that `length` rows, from a block's first on, reach."""
    return (length - 1 + after) // block + -(-before // block) + 1


def banded_side(before: int, after: int) -> int:
    """Chooses the size of tiles for a window: that with the least time for a row.

    time = tiles in its block's run · keys in a tile · time of a pair
    """
    time = lambda side: run_length(side, side, before, after) * side * PAIR[side]
    return min(PAIR, key=time)


def _banded_plan(problem: Problem, side: int) -> Plan:
    """Chooses small tiles for a narrow window: they hold less that it hides."""
    sizes = problem.sizes
    T, S = _even(sizes.T, side), _even(sizes.S, side, 64)
    fit = max(1, 2**19 // (T * S * sizes.G))  # as below
    K = _divisor(sizes.K, fit)
    B = _divisor(sizes.B, fit // K) if K == sizes.K else 1
    return Plan(B, K, sizes.G, T, S, banded=True)


def _gpu_plan(problem: Problem, spread: bool, tile, logits: int) -> Plan:
    """Chooses the tiles of a GPU: all heads and examples, as far as `logits` allow."""
    sizes = problem.sizes
    T, S = _even(sizes.T, MOST), _even(sizes.S, MOST, 64)
    if problem.mask is None:  # nothing is skipped, so keys are cut only if they must be
        S = _even(sizes.S, max(MOST, logits // (sizes.B * sizes.N * T)), 64)
    elif sizes.G * sizes.T <= FEW_ROWS:  # most time goes into reading the keys
        S = _even(sizes.S, 8192, 64)
    if tile is not None:
        T, S = min(tile[0], sizes.T), min(tile[1], sizes.S)
    if spread:  # all examples and heads: a loop would cut axes that devices divide
        return Plan(sizes.B, sizes.K, sizes.G, T, S, flat=True)
    fit = max(1, logits // (T * S * sizes.G))
    K = _divisor(sizes.K, fit)
    B = _divisor(sizes.B, fit // K) if K == sizes.K else 1
    return Plan(B, K, sizes.G, T, S, flat=True)


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
