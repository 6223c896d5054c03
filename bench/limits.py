"""The least time that a row could take on this machine: its products and exponentials.

    seconds = pairs · (i / inner + o / outer + e / exponential)

`pairs` are those that the mask allows, so a causal row counts its triangle only. Of each
pair, i operations are in products along heads, such as q · kₛ; o in products along keys or
queries, such as Σₛ weightₛ vₛ; and e are exponentials:

    forward           i = 2H           o = 2D            e = 1
    with gradients    i = 4H + 2D      o = 4D + 4H       e = 2

The rates are of products of a large tile, with the row's head size and dtype, and of
exponentials of an array that stays in the cache. XLA multiplies small matrices at less than
half of that rate, but the machine need not: torch does better. The rates are measured in
turns with the row, and the best time of each counts: what slows the machine for a while
would make the limit too high.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import measure
from bench.candidates import INPUTS, num_cores
from jattn.call.pose import pose
from jattn.call.problem import index
from jattn.implementations import shared

TILE = 1024  # queries or keys of a product: larger tiles gain nothing
IN_CACHE = 2**16  # float32 numbers, 256 KiB: an L2 of today holds them
REPEATS = 8  # in one call, so that calling costs little beside it


class Rate(NamedTuple):
    """Something to time, and how many operations it does."""

    run: Callable
    operations: float


def rates(work: measure.Work) -> dict[str, Rate]:
    """Gives what a row's limit is made of, to be timed in turns with the row."""
    sizes, dtype = work.sizes, work.dtype
    return {
        "inner": _product(TILE, sizes.H, TILE, dtype),
        "outer": _product(TILE, TILE, sizes.D, dtype),
        "exponential": _exponentials(),
    }


def limit(work: measure.Work, label: str, rates: dict[str, Rate], times) -> float:
    """Gives the seconds of a row by the best time of each rate."""
    per = {name: min(times[name]) / rate.operations for name, rate in rates.items()}
    H, D = work.sizes.H, work.sizes.D
    both = label != "forward"
    inner, outer = (4 * H + 2 * D, 4 * D + 4 * H) if both else (2 * H, 2 * D)
    each = inner * per["inner"] + outer * per["outer"] + (1 + both) * per["exponential"]
    return allowed_pairs(work) * each


def share(row: str, seconds: float, least: float) -> float:
    """Gives the limit by the best time of a row.

    Raises:
        SystemExit: If it is above 1, which no row can reach.
    """
    if least > seconds:
        raise SystemExit(
            f"{' '.join(row.split())}: {1e3 * seconds:.2f} ms is less than the limit of "
            f"{1e3 * least:.2f} ms. The limit was measured badly, as something else was "
            f"running: measure again."
        )
    return least / seconds


def allowed_pairs(work: measure.Work) -> int:
    """Counts the pairs that the mask allows, over examples and heads."""
    options = {name: x for name, x in work.options.items() if name != "sink"}
    arrays = (work.inputs[name] for name in INPUTS)
    problem, operands = pose("limits", *arrays, **options)

    @jax.jit
    def by_query(operands):
        allowed = shared.allowed(problem, operands, index(problem, operands))
        allowed = True if allowed is None else allowed
        allowed = jnp.broadcast_to(allowed, problem.sizes.BNTS)
        return jnp.sum(allowed, axis=-1, dtype=jnp.int32)

    return int(np.asarray(by_query(operands)).sum(dtype=np.int64))


@functools.cache
def _product(rows: int, inner: int, columns: int, dtype: str) -> Rate:
    """Makes a run of REPEATS products of this shape.

    Each takes a number of the one before, so that XLA can leave none out.
    """
    left, right = (
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
        for shape in ((rows, inner), (inner, columns))
    )

    def repeated(left, right):
        def once(_, carry):
            left, _ = carry
            found = jnp.dot(left, right, preferred_element_type=jnp.float32)
            # A number of the result moves the next input a little.
            moved = left + (1e-30 * found[0, 0]).astype(left.dtype)
            return moved, found

        empty = jnp.zeros((rows, columns), jnp.float32)
        return lax.fori_loop(0, REPEATS, once, (left, empty))[1]

    run = measure.waiting(functools.partial(jax.jit(repeated), left, right))
    return Rate(run, 2.0 * REPEATS * rows * inner * columns)


@functools.cache
def _exponentials() -> Rate:
    """Makes a run of exponentials of an array that stays in the cache of a core.

    So small an array is computed on one core. All cores together are taken to do as many
    times more as there are of them.
    """
    count = 64  # in turn, so that the call costs little

    def repeated(x):
        return lax.fori_loop(0, count, lambda _, x: jnp.exp(-x), x)

    start = jnp.asarray(np.random.default_rng(0).random(IN_CACHE), jnp.float32)
    run = measure.waiting(functools.partial(jax.jit(repeated), start))
    return Rate(run, float(num_cores() * count * IN_CACHE))
