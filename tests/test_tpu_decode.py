"""The kernel for caches on TPU, emulated: equal to the definition, without races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jattn
from jattn import caches, definition
from jattn.caches import asked, attend
from jattn.caches.pages import Pages
from jattn.implementations.tpu.decode import slots, steps
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.masks import Causal
from tests.helpers import emulated_decode

B, S, N, K, H, D = 2, 300, 4, 2, 16, 24  # three blocks, of which the last is not full
COUNTS = np.array([150, 280])
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SLOW = pytest.mark.slow


def draw(seed, *shape, dtype="float32"):
    array = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(array, jnp.float32).astype(dtype)


def tokens(T, D=D):
    return draw(1, B, T, K, H), draw(2, B, T, K, D)


@functools.cache
def ragged(dtype="float32"):
    kv = caches.empty(B, S, K, H, D, ragged=True, dtype=dtype)
    rounded = dtype not in ("float32", "bfloat16")
    key, value = (x if rounded else x.astype(dtype) for x in tokens(COUNTS.max()))
    return kv.append(key, value, count=COUNTS)


@functools.cache
def paged(dtype="float32"):
    """Pages in another order than the tokens; values of 128 lie as they are read."""
    kv = caches.paged(7, 128, K, H, 128, batch_size=B, max_pages=3, dtype=dtype)
    key, value = tokens(COUNTS.max(), 128)
    for first, last in ((0, 100), (100, COUNTS.max())):
        count = np.clip(COUNTS - first, 0, last - first)
        kv = kv.append(key[:, first:last], value[:, first:last], count=count)
    return kv


@functools.cache
def latent(dtype="float32"):
    kv = caches.latent(B, S, 40, 8, dtype=dtype, ragged=True)
    key, rotary = draw(3, B, COUNTS.max(), 40), draw(4, B, COUNTS.max(), 8)
    return kv.append(key, rotary, count=COUNTS)


def vectors(kv):
    """Keys and values of the tokens in order; what was not appended is NaN."""
    if isinstance(kv, caches.LatentCache):
        return vectors(kv.cache)
    source = Pages(kv.store, kv.table) if isinstance(kv, caches.PagedCache) else kv.store
    fill = np.arange(source.slots) < np.asarray(kv.length)[:, None]
    dtype = "float32" if kv.store.is_rounded else kv.store.dtype
    whole = source.vectors(dtype)
    return [np.where(fill[..., None, None], np.asarray(x, float), np.nan) for x in whole]


def wanted(kv, query, options):
    """The definition in float64 over the tokens of each example."""
    lengths, T = np.asarray(kv.length), query.shape[1]
    key, value = vectors(kv)
    query = np.asarray(query.astype("float32"), float)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, float) if x.dtype.kind in "fV" else x
        mask = jattn.masks.Lengths(lengths)
        if options.get("mask") is not None:
            mask &= jattn.masks.as_mask(options["mask"])
        position = lengths[:, None] - T + np.arange(T, dtype=np.int32)
        whole = dict(options) | {"mask": mask, "query_position": position}
        for name in ("bias", "sink"):
            if name in whole:
                whole[name] = wide(np.asarray(whole[name]))
        attend = functools.partial(definition.attention_state, **whole)
        return jax.tree.map(np.asarray, jax.jit(attend)(query, key, value))


def assert_close(got, want, dtype="float32"):
    tolerance = 2.5 * float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 2e-6
    for x, y in zip(got, want, strict=True):
        x = np.asarray(x.astype(jnp.float32))
        large = np.max(np.abs(y), where=np.isfinite(y), initial=1)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * large)


SLOPES = jnp.array([0.5, 0.25, 0.1, 0.3])
LAMBDAS = {
    "mask": lambda b, n, t, s: (t >= s) & ((t - s < 60) | (s < 4)) & ((s + n) % 3 != b),
    "modifier": lambda logit, b, n, t, s: (
        5 * jnp.tanh(logit / 5)
        - (SLOPES[n] * jnp.abs(t - s).astype(SLOPES.dtype) / 100).astype(logit.dtype)
    ),
}
CASES = {
    "one query": (ragged, 1, {}),
    "lambdas, three queries": (ragged, 3, LAMBDAS),
    "int8": (lambda: ragged("int8"), 2, {"mask": Causal()}),
    "pages": (paged, 2, {"mask": Causal()}),
    "latent": (latent, 2, {"mask": Causal(), "scale": 0.2}),
    "bfloat16": (lambda: ragged("bfloat16"), 2, {"mask": Causal()}),
    "float8": (lambda: ragged("float8_e4m3fn"), 1, {}),
    "pages in 8 bits": (lambda: paged("int8"), 1, LAMBDAS),
    "latent in 8 bits": (lambda: latent("int8"), 1, {"scale": 0.2}),
    "bias": (ragged, 2, {"bias": draw(5, N, 1, S), "mask": Causal()}),
    "bias of every pair": (ragged, 2, {"bias": draw(6, N, 2, S), "mask": Causal()}),
    "dropout": (ragged, 1, {"dropout": jattn.Dropout(0.3, jax.random.key(0))}),
    "sink": (ragged, 1, {"sink": draw(7, N)}),
}
QUICK = ("lambdas, three queries", "pages")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else SLOW) for x in CASES]
)
def test_emulated_kernel_equals_definition_without_races(name, capfd):
    make, T, options = CASES[name]
    kv = make()
    size = 48 if isinstance(kv, caches.LatentCache) else H
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    query = draw(0, B, T, N, size, dtype=dtype)
    got = emulated_decode.attend_state(kv, query, interpret=RACES, **options)
    assert_close(got, wanted(kv, query, options), dtype)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "kinds",
    [
        [[[2, 2, 1, 0]], [[0, 0, 0, 0]]],
        [[[0, 1, 0, 2]], [[2, 2, 2, 1]]],
        [[[0, 0, 0, 0]]],
    ],
)
def test_steps_visit_live_blocks_alone_and_end_once(kinds):
    kinds = np.array(kinds, np.int8)
    words, count = steps.steps(kinds)
    traced, traced_count = jax.jit(steps.steps)(kinds)
    assert count == traced_count == max(1, (kinds != 0).sum(-1).max())
    np.testing.assert_array_equal(words[..., :count], traced[..., :count])
    for some, row in zip(np.asarray(words)[:, 0], kinds[:, 0], strict=True):
        live = np.flatnonzero(row)
        some = some[:count]
        visited = [(x >> 3, x & 3) for x in some if x & 3]
        assert visited == [(i, row[i]) for i in live]
        assert [bool(x & steps.LAST) for x in some].index(True) == max(len(live), 1) - 1
        assert sum(bool(x & steps.LAST) for x in some) == 1
        rest = some[len(live) :] >> 3  # no other block is copied
        assert set(rest.tolist()) <= {live[-1] if len(live) else 0}


def test_float8_is_read_to_the_bit():
    bits = jnp.arange(256, dtype=jnp.uint8)
    want = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)
    got = slots.numbers(bits, jnp.float32)
    sound = np.isfinite(want)  # NaN is never stored
    np.testing.assert_array_equal(got[sound], want[sound])


def test_hidden_values_that_are_not_finite_touch_nothing():
    kv, query = ragged(), draw(0, B, 1, N, H)
    mask = lambda b, n, t, s: s != 5
    want = emulated_decode.attend_state(kv, query, mask=mask)
    spoiled = kv.store.values.at[:, :, 5].set(jnp.nan).at[0, :, 200].set(jnp.inf)
    keys = kv.store.keys.at[..., 5].set(jnp.nan)
    store = kv.store.map(lambda x, axis: keys if axis == -1 else spoiled)
    spoiled = caches.Cache(store, kv.length)
    got = emulated_decode.attend_state(spoiled, query, mask=mask, alone=False)
    assert_close(got, [np.asarray(x, float) for x in want])


def refused(kv, query, **options):
    store = kv.store
    source = Pages(store, kv.table) if isinstance(kv, caches.PagedCache) else store
    sizes = attend.sizes_of(query, source)
    problem, _ = asked.posed("test", query, sizes, options)
    return Decoder().refusal(problem, source.arrays(), source.dtype) or ""


def test_what_it_cannot_do_is_refused_in_a_sentence():
    empty = lambda H=8, **given: caches.empty(1, 16, 1, H, **given)
    ones = lambda N=1, H=8, dtype="float32": jnp.ones((1, 1, N, H), dtype)
    assert refused(empty(), ones()) == ""
    assert "two in a byte" in refused(empty(dtype="int4"), ones())
    assert "bfloat16 and float32" in refused(empty(dtype="float16"), ones(dtype="float16"))
    assert "head sizes up to 576" in refused(empty(600), ones(H=600))
    assert "up to 512 rows" in refused(empty(), ones(600))
    table = jnp.arange(9.0)
    joins = lambda b, n, t, s: table[t - s] > 3
    assert "joins queries" in refused(empty(), ones(), mask=joins)
    pages = caches.paged(2, 16, 1, 8, batch_size=1, max_pages=2)
    assert "multiple of 128" in refused(pages, ones())
