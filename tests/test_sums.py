"""Sinks, parts and views are as exact at logits of 1e8 as at 1.

The logits are exact in float32: whole numbers, at 1e8 all the same. What is then wrong by
more than a few roundings, a rounded logsumexp has spoiled; at 1e8 it is off by up to 4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches, definition
from jattn.implementations import sums
from jattn.masks import Causal
from tests.helpers import emulated_tpu, flat, small_tiles

T, S, N, H, D = 8, 64, 2, 4, 3
SIZES = (1.0, 1e2, 1e4, 1e8)
# Some roundings of exponentials and divisions, and those of sums of 64 numbers.
BOUND = 16 * float(np.finfo("float32").eps)


def inputs(size: float):
    """The query is (1, 0, 0, 0), so that the first number of a key is its logit."""
    rng = np.random.default_rng(0)
    query, key = np.zeros((1, T, N, H)), np.zeros((1, S, N, H))
    query[..., 0] = 1
    key[..., 0] = size + (np.round(2 * rng.standard_normal((1, S, N))) if size < 1e7 else 0)
    value = rng.standard_normal((1, S, N, D))
    return [x.astype(np.float32) for x in (query, key, value)]


def exact(function, *arrays, **options):
    """Calls a function of arrays in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        return np.asarray(function(*wide, scale=1.0, **options))


def assert_near(got, want):
    error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
    assert error < BOUND


def with_sink(query, key, value, sink, **options):
    return definition.attention(query, key, value, sink=sink, **options)


WAYS = {
    "dense": lambda *x, **o: jattn.attention(*x, implementation="dense", **o),
    "blockwise": lambda *x, **o: jattn.attention(*x, implementation="blockwise", **o),
    "small tiles": small_tiles.attention,
    "one loop": lambda *x, **o: flat.attention_state(*x, **o).output,
    "TPU": lambda *x, **o: emulated_tpu.attention_state(*x, **o).output,
    "cache": lambda q, k, v, **o: caches.empty(1, S, N, H, D).append(k, v).attend(q, **o),
    "weights": lambda q, k, v, **o: jnp.einsum(
        "BNTS,BSND->BTND", jattn.attention_weights(q, k, **o), v
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_sinks(way, size):
    arrays = inputs(size)
    for below in (0, 10, 25) if size < 1e7 else (0,):
        sink = np.float32([size, size - below])
        assert_near(
            WAYS[way](*arrays, sink=sink, scale=1.0), exact(with_sink, *arrays, sink)
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_sinks_that_have_little_weight(way, size):
    """1 − share is not 0 where share rounds to 1."""
    arrays = inputs(size)
    for below in (0, 10, 25) if size < 1e7 else (0,):
        sink = np.full(N, size - below, np.float32)
        loss = lambda s: (WAYS[way](*arrays, sink=s, scale=1.0) ** 2).sum()
        assert_near(jax.grad(loss)(sink), exact(_gradient, sink, *arrays))


def _gradient(sink, *arrays, **options):
    return jax.grad(lambda s: (with_sink(*arrays, s, **options) ** 2).sum())(sink)


@pytest.mark.parametrize("size", SIZES)
def test_views(size):
    query, key, _ = inputs(size)
    sink = np.float32([size, size])
    weights = exact(
        lambda q, k, s, **o: definition.attention_weights(q, k, sink=s, **o),
        query,
        key,
        sink,
    )
    log = lambda x: np.log(np.where(x > 0, x, 1))
    rest = 1 - weights.sum(-1)
    entropy = -(weights * log(weights)).sum(-1) - rest * log(rest)
    options = {"sink": sink, "scale": 1.0}
    received = weights.sum(2).swapaxes(1, 2)
    assert_near(jattn.attention_entropy(query, key, **options), entropy.swapaxes(1, 2))
    assert_near(jattn.attention_received(query, key, **options), received)
    strongest = jattn.strongest_keys(query, key, S, **options).weights
    assert_near(strongest, -np.sort(-weights.swapaxes(1, 2), axis=-1))


@pytest.mark.parametrize("size", SIZES)
def test_prompts_of_rolling_caches(size):
    query, key, value = inputs(size)
    query = np.repeat(query[:, :1], S, axis=1)
    sink = np.float32([size, size])
    kv = caches.rolling(1, S, N, H, D, sinks=2)
    parts = []
    for start, end in ((0, 40), (40, 47), (47, 48), (48, S)):
        tokens = (x[:, start:end] for x in (query, key, value))
        part, kv = kv.extend(*tokens, scale=1.0, sink=sink)
        parts.append(part)
    want = exact(with_sink, query, key, value, sink, mask=Causal())
    assert_near(np.concatenate(parts, axis=1), want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", ["merge", "ring"])
def test_devices_that_see_unlike_many_keys(strategy, size):
    query, key, value = inputs(size)
    sink = np.float32([size, size])
    options = {"mask": lambda b, n, t, s: s < 20}
    context = jattn.Context("context", strategy=strategy)
    with jax.set_mesh(jax.make_mesh((4,), ("context",))):
        got = jax.jit(
            lambda *x: jattn.attention(*x, sink=sink, scale=1.0, context=context, **options)
        )(query, key, value)
    assert_near(got, exact(with_sink, query, key, value, sink, **options))


def by_devices(strategy):
    mesh = jax.make_mesh((4,), ("context",))
    context = jattn.Context("context", strategy=strategy, mesh=mesh)
    return functools.partial(jattn.attention, context=context)


def by_rolling_cache(query, key, value, **options):
    kv = caches.rolling(1, S, N, H, D)
    _, kv = kv.extend(*(x[:, : S - T] for x in (key, key, value)), **options)
    tokens = (x[:, S - T :] for x in (key, value))
    return kv.extend(query, *tokens, **options)[0]


def by_merged_states(query, key, value, **options):
    parts = zip(*(jnp.split(x, 4, axis=1) for x in (key, value)), strict=True)
    states = [jattn.attention_state(query, *part, **options) for part in parts]
    return jattn.merge(*states).output


PARTS = {
    "ring": by_devices("ring"),
    "merge": by_devices("merge"),
    "rolling": by_rolling_cache,
    "merged states": by_merged_states,
}


@pytest.mark.parametrize("size", [1e4, 1e6])
@pytest.mark.parametrize("way", [*WAYS, *PARTS])
def test_tangents_where_one_key_has_all_the_weight(way, size):
    """Checks that large tangents of logits change nothing, to the last place."""
    rng = np.random.default_rng(1)
    query, key, value = inputs(1.0)
    key[:, ::3, :, 0] += 0.5 * size
    key[:, 30, :, 0] += size
    tangents = [np.float32(rng.standard_normal(x.shape)) for x in (query, key, value)]
    tangents[1] *= size
    call = functools.partial((WAYS | PARTS)[way], scale=1.0)
    _, got = jax.jit(lambda *x: jax.jvp(call, *x))((query, key, value), tuple(tangents))
    assert_near(got, np.broadcast_to(tangents[2][:, [30]], got.shape))


def test_a_rolling_cache_says_which_sink_does_not_fit():
    query, key, value = inputs(1.0)
    kv = caches.rolling(1, 8, N, H, D)
    with pytest.raises(ValueError, match=r"caches\.extend: `sink`"):
        kv.extend(query, key[:, :T], value[:, :T], sink=np.zeros(3, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", ["dense", "blockwise", "cache", "weights"])
@pytest.mark.parametrize("shape", [(), (N,)])
def test_gradients_of_narrow_sinks_are_rounded_once(way, dtype, shape):
    """They are sums over all rows, and in bfloat16 256 + 1 is 256."""
    rng, rows = np.random.default_rng(0), 4096
    sizes = (1, rows, N, H), (1, S, N, H), (1, S, N, D), (1, rows, N, D)
    *arrays, weight = (jnp.asarray(rng.standard_normal(x), dtype) for x in sizes)
    sink = jnp.full(shape, 0.25, dtype)
    kv = caches.empty(1, S, N, H, D, dtype=dtype).append(*arrays[1:])
    attend = {"cache": lambda q, k, v, **o: kv.attend(q, **o)}.get(way, WAYS[way])

    def gradient(attend, sink, *arrays):
        *arrays, weight = arrays
        total = lambda x: jnp.sum(
            (attend(*arrays, sink=x, scale=1.0) * weight).astype(float)
        )
        return jax.grad(total)(sink)

    with jax.numpy_dtype_promotion("standard"):
        got = gradient(attend, sink, *arrays, weight)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in (*arrays, weight)]
        want = np.asarray(gradient(definition.attention, sink.astype(float), *wide))
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    assert np.max(error) <= float(jnp.finfo(dtype).eps) * np.max(np.abs(want))


@pytest.mark.parametrize("logits", [(25.0, 0.5), (0.5, 25.0)])
def test_shares_of_one_part_with_nearly_all_weight(logits):
    """Checks that one share loses what the other gains, also less than a rounding of 1."""

    def output(logits):
        top = jax.lax.stop_gradient(logits)
        totals, values = jnp.exp(logits - top), jnp.eye(2, dtype=logits.dtype)[1]
        parts = [sums.Sums(values[i][None], top[i], totals[i]) for i in (0, 1)]
        return sums.combined(*parts).output[0]

    logits = np.float32(logits)
    slope = np.exp(-24.5) / (1 + np.exp(-24.5)) ** 2
    want = np.array([-slope, slope])
    np.testing.assert_allclose(jax.grad(output)(logits), want, rtol=1e-5)
    steps = jnp.eye(2, dtype=jnp.float32)
    tangents = [jax.jvp(output, (logits,), (step,))[1] for step in steps]
    np.testing.assert_allclose(tangents, want, rtol=1e-5)
    tie = jnp.zeros(2, jnp.float32)  # the second derivative of a sigmoid is 0 there
    np.testing.assert_allclose(jax.hessian(output)(tie), np.zeros((2, 2)), atol=1e-6)
