"""Narrow windows, whose small tiles follow from their numbers, equal the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.api.attention import _on_one
from jattn.blocks.kinds import PARTIAL
from jattn.call.pose import pose
from jattn.implementations.blockwise import plan as plans
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.schedule import Side, _band, schedules
from jattn.masks import Causal, Lengths, Segments, Window
from jattn.modifiers import ALiBi, SoftCap
from tests.helpers.draws import normal

B, T, S, N, K, H = 2, 300, 333, 4, 2, 8  # neither a multiple of a tile
IDS = np.sort(np.random.default_rng(0).integers(0, 9, S)).astype(np.int32)
attend = functools.partial(jattn.attention_state, implementation="blockwise")
MASKS = {
    "back": Window(20, 0),
    "forth": Window(0, 33),
    "both": Window(9, 20),
    "itself": Window(0, 0),
    "causal": Causal() & Window(37, None),
    "shifted": Causal(-3) & Window(20, None),
    "either": Window(3, 0) | Window(0, 4),
    "lengths": Window(20, 5) & Lengths(np.array([100, 333], np.int32)),
    "segments": Window(20, 5) & Segments(IDS[:T], IDS),
    "lambda": Window(20, 10) & (lambda b, n, t, s: (t + s + n) % 3 != b),
    "rows_without_keys": Window(20, 0) & (lambda b, n, t, s: t % 70 > 3),
}


def inputs(T=T, S=S, dtype="float32"):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [normal(seed, shape, dtype) for seed, shape in enumerate(shapes)]


def values_and_gradients(function, arrays, **options):
    attend = lambda *arrays: function(*arrays, **options)
    state, pull = jax.vjp(attend, *arrays)
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), state)
    seen = jnp.isfinite(state.logsumexp)
    weights = weights._replace(logsumexp=jnp.where(seen, weights.logsumexp, 0))
    weights = jax.tree.map(lambda w, x: w.astype(x.dtype), weights, state)
    state = state._replace(logsumexp=jnp.where(seen, state.logsumexp, 0))
    return (*state, *pull(weights))


def assert_exact(arrays, **options):
    """The errors are at most a few roundings of the largest number."""
    got = jax.jit(lambda *x: values_and_gradients(attend, x, **options))(*arrays)
    with jax.enable_x64(True):
        wide = [x.astype("float64") for x in arrays]
        exact = functools.partial(values_and_gradients, definition.attention_state)
        want = jax.jit(lambda *x: exact(x, **options))(*wide)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6 * max(1, np.max(np.abs(y))), rtol=0)


def tile(mask, T=T, S=S, **options):
    shape = lambda length, heads: jax.ShapeDtypeStruct((B, length, heads, H), "float32")
    given = shape(T, N), shape(S, K), shape(S, K)
    options |= {"implementation": "blockwise", "platform": "cpu"}
    return jattn.explain(*given, mask=mask, **options).blocks.sizes


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_those_of_the_definition(name):
    assert max(tile(MASKS[name])) == 64
    assert_exact(inputs(), mask=MASKS[name])


def test_everything_with_a_window():
    options = {
        "modifier": ALiBi() >> SoftCap(5.0),
        "bias": normal(5, (1, N, 1, S)),
        "sink": normal(6, (N,)),
        "scale": 0.7,
    }
    assert_exact(inputs(), mask=Causal() & Window(30, None), **options)


def test_what_is_hidden_and_not_finite_touches_nothing():
    query, key, value = inputs()
    bad = [x.at[:, 290:].set(jnp.nan) for x in (key, value)]
    mask = Window(20, 0) & (lambda b, n, t, s: s < 290)
    got = values_and_gradients(attend, (query, *bad), mask=mask)
    want = values_and_gradients(attend, (query, key, value), mask=mask)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("order", ["jvp", "hvp"])
def test_other_derivatives_are_those_of_whole_rows(order):
    arrays, mask = inputs(), Window(20, 5)
    tangents = [normal(seed, x.shape) for seed, x in enumerate(arrays, 9)]

    def derivative(name, *arrays):
        total = lambda *x: jnp.sum(
            jnp.sin(jattn.attention(*x, mask=mask, implementation=name))
        )
        function = jax.grad(total, argnums=(0, 1, 2)) if order == "hvp" else total
        return jax.jvp(function, arrays, tuple(tangents))[1]

    got, want = (
        jax.jit(functools.partial(derivative, name))(*arrays)
        for name in ("blockwise", "dense")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


# More queries than keys and the reverse: at the ends, blocks reach fewer tiles than most.
@pytest.mark.parametrize("lengths", [(T, S), (1100, 1100), (1100, 600), (600, 1100)])
@pytest.mark.parametrize("mask", [Window(20, 5), Window(0, 70), Causal() & Window(10, 3)])
def test_views_look_at_the_tiles_of_the_window(mask, lengths):
    query, key, _ = inputs(*lengths)
    weights = jattn.attention_weights(query, key, mask=mask)
    found = jattn.strongest_keys(query, key, 3, mask=mask)
    want, keys = jax.lax.top_k(jnp.moveaxis(weights, 1, 2), 3)
    np.testing.assert_allclose(found.weights, want, atol=1e-6)
    np.testing.assert_array_equal(found.indices, jnp.where(want > 0, keys, -1))
    received = jattn.attention_received(query, key, mask=mask)
    np.testing.assert_allclose(received, jnp.moveaxis(weights.sum(2), 1, 2), atol=1e-5)


def test_given_positions_may_lie_anywhere():
    where = jnp.asarray(np.random.default_rng(3).permutation(T), jnp.int32)
    placed = {"query_position": where[None], "mask": Window(20, 0)}
    assert max(tile(**placed)) > 64
    assert_exact(inputs(), **placed)


def test_windows_of_about_one_size_share_a_program():
    arrays = inputs()
    attend(*arrays, mask=Window(11, 0))
    count = _on_one._cache_size()
    for left in (1, 12, 37):
        attend(*arrays, mask=Window(left, 0))
    assert _on_one._cache_size() == count


@pytest.mark.parametrize("mask", [Window(20, None), Window(100, 0), ~Window(20, 0)])
def test_what_is_not_narrow_has_the_usual_tiles(mask):
    assert max(tile(mask)) > 64


def test_a_tile_is_as_small_as_the_window_and_no_smaller():
    size = lambda mask: tile(mask, 4096, 4096)[1]
    windows = (1, 64, 128, 256, 511)
    assert [size(Window(x, 0)) for x in windows] == [64, 64, 128, 256, 512]


@pytest.mark.parametrize("rows", [64, 96])
def test_the_run_of_a_block_is_all_that_it_reaches(rows):
    before, after, count, others, other = 70, 20, 7, 9, 64
    kinds = np.full((1, 1, 1, 1), PARTIAL)
    sides = Side(count * rows, rows, 1024), Side(others * other, other, 1024)
    order, _, live = _band(kinds, *sides, before, after)[:3]
    for i in range(count):
        reached = range(max(0, rows * i - before), min(rows * i + rows + after, 9 * other))
        want = sorted({s // other for s in reached})
        assert order[0, 0, i, : live[0, 0, i]].tolist() == want
        assert len(want) <= plans.run_length(rows, other, before, after)


@pytest.mark.parametrize("rows", [8, 16, 100, 200])  # in a cell, and more than cells have
def test_a_run_leaves_out_what_the_table_says_is_empty(rows):
    cell, rng = 16, np.random.default_rng(rows)
    kinds = rng.integers(0, 2, (2, 3, -(-200 // cell), -(-300 // cell)))
    sides = Side(200, rows, cell), Side(300, 24, cell)
    order, _, live = _band(jnp.asarray(kinds), *sides, 40, 10)[:3]
    pairs = np.repeat(np.repeat(kinds, cell, 2), cell, 3)[:, :, :200, :300]
    for b, n, i in np.ndindex(2, 3, -(-200 // rows)):
        first, last = rows * i, min(rows * (i + 1), 200) - 1
        keys = range(max(0, first - 40), min(first + rows + 9, 299) + 1)
        reached = {s // 24 for s in keys}  # tiles, and those of them with a pair
        seen = pairs[b, n, first : last + 1].any(0)
        want = [j for j in sorted(reached) if seen[24 * j : 24 * j + 24].any()]
        assert set(want) <= set(order[b, n, i, : live[b, n, i]].tolist()) <= reached


def test_what_else_hides_whole_blocks_is_skipped():
    query, key, value = (normal(seed, (1, 2048, 1, 8)) for seed in range(3))
    mask = Window(20, 0) & Lengths(jnp.array([600]))
    problem, operands = pose("bands", query, key, value, mask=mask)
    by_query, by_key = schedules(Layout(problem, operands, plans.plan(problem, False)))
    for schedule in (by_query, by_key):  # the cells of 512 beyond 600 are empty
        assert np.sum(np.asarray(schedule.live)) <= 2 * 1024 // 64  # two tiles for each row
