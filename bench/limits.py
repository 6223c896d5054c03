"""The least time that a row could take on this machine: its products and exponentials.

    seconds = pairs · (i / inner + o / outer + e / exponential)

`pairs` are those that the mask allows, so a causal row counts its triangle only. Of each
pair, i operations are in products along heads, such as q · kₛ; o in products along keys or
queries, such as Σₛ weightₛ vₛ; and e are exponentials:

    forward           i = 2H           o = 2D            e = 1
    with gradients    i = 4H + 2D      o = 4D + 4H       e = 2

The rates are of products of a tile's shape in the row's dtype, and of exponentials of an
array that stays in the cache. They are measured in turns with the row, and the best time of
each counts: what slows the machine for a while would make the limit too high.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import measure
from bench.candidates import num_cores
from jattn.mask import as_mask
from jattn.shapes import Sizes

TILE = 1024  # queries or keys of a product, at most: tiles of more gain nothing
IN_CACHE = 2**16  # float32 numbers, 256 KiB: an L2 of today holds them
REPEATS = 8  # in one call, so that calling costs little beside it


class Rate(NamedTuple):
    """Something to time, and how many operations it does."""

    run: Callable
    operations: float


def rates(work: measure.Work) -> dict[str, Rate]:
    """Gives what a row's limit is made of, to be timed in turns with the row."""
    sizes, dtype = work.sizes, work.dtype
    T, S = min(sizes.T * sizes.G, TILE), min(sizes.S, TILE)
    return {
        "inner": _product(T, sizes.H, S, dtype),
        "outer": _product(T, S, sizes.D, dtype),
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
    sizes, options = work.sizes, work.options
    mask = options.get("mask")
    if not {"query_position", "key_position"}.isdisjoint(options):
        raise ValueError("limits: pairs are counted where positions count from 0 only.")
    if mask is None:
        return sizes.B * sizes.N * sizes.T * sizes.S
    return _counted(as_mask(mask), sizes)


def _counted(mask, sizes: Sizes) -> int:
    """Counts what a mask allows, some queries at a time."""
    aligned = jax.tree.map(jnp.asarray, mask.aligned(sizes))

    def element(array, at):
        shape = zip(at, array.shape, strict=True)
        return array[tuple(jnp.minimum(i, size - 1) for i, size in shape)]

    @jax.jit
    def count(t):
        def allows(*at):
            return mask.allows(*at, jax.tree.map(lambda x: element(x, at), aligned))

        over = allows
        for axis in (3, 2, 1, 0):
            axes = [None] * 4
            axes[axis] = 0
            over = jax.vmap(over, axes)
        b, n, s = (jnp.arange(x, dtype=jnp.int32) for x in (sizes.B, sizes.N, sizes.S))
        return jnp.sum(over(b, n, t, s), axis=(0, 1, 3), dtype=jnp.int32)

    rows = np.arange(sizes.T, dtype=np.int32)
    step = max(2**24 // (sizes.B * sizes.N * sizes.S), 1)
    parts = (rows[i : i + step] for i in range(0, sizes.T, step))
    return sum(int(np.asarray(count(part)).astype(np.int64).sum()) for part in parts)


@functools.cache
def _product(rows: int, inner: int, columns: int, dtype: str) -> Rate:
    """Times products of this shape, each of which needs the one before."""
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
    """Times exponentials of an array that stays in the cache of a core.

    So small an array is computed on one core. All cores together are taken to do as many
    times more as there are of them.
    """
    count = 64  # in turn, so that the call costs little

    def repeated(x):
        return lax.fori_loop(0, count, lambda _, x: jnp.exp(-x), x)

    start = jnp.asarray(np.random.default_rng(0).random(IN_CACHE), jnp.float32)
    run = measure.waiting(functools.partial(jax.jit(repeated), start))
    return Rate(run, float(num_cores() * count * IN_CACHE))
