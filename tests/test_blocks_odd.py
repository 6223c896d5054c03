"""Tables of masks of odd types: denormal floats, integers of 4 bits, narrow indices."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jattn
from tests.test_blocks import assert_sound, dense, make_grid, table_of

GRID = make_grid((8, 8), (None, None), (2, 2))


def check(function, skips=None):
    mask = lambda arrays, b, n, t, s, row, column: function(t, s)
    table = table_of(mask, {}, GRID)
    assert_sound(table, dense(mask, {}, GRID), GRID)
    assert skips is None or np.any(table != 1) == skips


TINY = jnp.full(8, 1e-40, jnp.float32)
MIXED = jnp.array([0, 1e-40, -1e-40, 1e-45, 1, -1, 2e-38, -2e-38], jnp.float32)
DENORMAL = {
    "compared": lambda t, s: TINY[s] > 0,
    "with another": lambda t, s: TINY[s] > MIXED[t],
    "bool": lambda t, s: TINY[s].astype(bool),
    "bfloat16": lambda t, s: TINY.astype(jnp.bfloat16)[s] > 0,
    "sign": lambda t, s: jnp.sign(TINY[s]) > 0,
    "ceil": lambda t, s: jnp.ceil(TINY[s]) > 0,
    "maximum": lambda t, s: jnp.maximum(TINY[s], MIXED[t]) > 0,
    "difference": lambda t, s: jnp.full(8, 1.5e-38)[s] - jnp.full(8, 1.2e-38)[t] > 0,
    "literal": lambda t, s: s.astype(jnp.float32) * 0 + 1e-40 > 0,
}


@pytest.mark.parametrize("name", DENORMAL)
def test_a_denormal_number_may_count_as_0(name):
    check(DENORMAL[name])


def test_normal_numbers_keep_their_tables():
    check(lambda t, s: MIXED[s] > 1.5, skips=True)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.uint2])
def test_integers_below_8_bits_wrap_around(dtype):
    cast, one = lambda x: x.astype(dtype), dtype(1)
    check(lambda t, s: cast(t) + cast(s) > one)
    check(lambda t, s: cast(t) - cast(s) + one > one)
    check(lambda t, s: lax.shift_left(cast(s), one) + cast(t) > one)
    check(lambda t, s: cast(t) * cast(s) > one)
    check(lambda t, s: ~(cast(t) & cast(s)) > one)
    check(lambda t, s: (cast(t) - cast(s) >= one) & (cast(t) >= cast(s)))
    check(lambda t, s: cast(s) == cast(t), skips=True)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_an_index_may_be_too_narrow_for_its_axis(dtype, mode):
    names = lax.GatherDimensionNumbers((), (0,), (0,))
    table = jnp.arange(300)

    def mask(t, s):
        where = (abs(s - t) if mode == "promise_in_bounds" else s - t).astype(dtype)
        return lax.gather(table, where.reshape(1), names, (1,), mode=mode).reshape(()) > 3

    check(mask)


def test_a_sum_that_is_part_of_many_is_seen_once():
    def mask(t, s):
        difference = t - s
        for _ in range(25):  # each time half of it, so that 2²⁵ paths lead to t − s
            difference = difference + difference
        return difference >= 0

    start = time.perf_counter()
    check(mask, skips=True)
    assert time.perf_counter() - start < 10  # hours along every path; 0.1 s here


def test_a_mask_that_depends_on_the_platform_is_decided_for_none():
    def mask(t, s):
        later = lambda t, s: t <= s
        return lax.platform_dependent(t, s, cpu=lambda t, s: t >= s, default=later)

    check(mask, skips=False)  # the program may be lowered for another platform


def test_a_mask_that_jit_closes_over_compiles_as_fast_as_one_that_it_takes():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((1, 1, 1024, 1024)) < 0.1)
    query = jnp.ones((1, 1024, 1, 8))
    attend = lambda query, mask: jattn.attention(query, query, query, mask=mask)

    def seconds(function, *arrays):
        start = time.process_time()
        jax.jit(function).lower(*arrays).compile()
        return time.process_time() - start

    taken = seconds(attend, query, mask)
    # Without a barrier XLA computes the table while it compiles: five times as long.
    assert seconds(lambda query: attend(query, mask), query) < 3 * taken
