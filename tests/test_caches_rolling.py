"""Rolling and latent caches equal attention over all tokens that were appended."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import jattn
from jattn import caches
from jattn.masks import Causal, Segments
from jattn.modifiers import ALiBi
from tests.helpers import machines
from tests.helpers.small_chunks import small_chunks as small_chunks

B, N, K, H, D, T, LONGEST = 2, 4, 2, 8, 6, 5, 40
SINK = jnp.array([0.5, -1.0, 0.0, 2.0])
USER = lambda b, n, t, s: (t + s) % 5 != n


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(count, seed=0):
    shapes = (B, count, N, H), (B, count, K, H), (B, count, K, D)
    return [draw((seed, i), *shape) for i, shape in enumerate(shapes)]


def rounded(dtype, *pair):
    kv = caches.empty(B, pair[0].shape[1], K, H, D, dtype=dtype).append(*pair)
    return kv.key, kv.value


def banded(window, sinks, mask=USER):
    return lambda b, n, t, s: (t >= s) & ((t - s < window) | (s < sinks)) & mask(b, n, t, s)


extend = jax.jit(
    lambda kv, *x: kv.extend(*x[:3], count=x[3], mask=USER, sink=SINK, modifier=ALiBi())
)


@functools.partial(jax.jit, static_argnames=("window", "sinks"))
def definition(query, key, value, first, *, window, sinks):
    position = first[:, None] + jnp.arange(query.shape[1])[None]
    return jattn.definition.attention(
        query,
        key,
        value,
        mask=banded(window, sinks),
        sink=SINK,
        modifier=ALiBi(),
        query_position=position,
    )


class Rolling(RuleBasedStateMachine):
    """A ragged ring beside all tokens that were ever appended."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        self.start(seed, (3, 1))

    def start(self, seed, kind):
        self.random = np.random.default_rng(seed)
        self.kind = dict(zip(("window", "sinks"), kind, strict=True))
        self.kv = caches.rolling(B, kind[0], K, H, D, sinks=kind[1], ragged=True)
        self.key = np.full((B, LONGEST, K, H), np.nan, "f")
        self.value = np.full((B, LONGEST, K, D), np.nan, "f")
        self.length = np.zeros(B, np.int32)

    @rule(length=st.sampled_from([1, T]), counts=st.tuples(*[st.integers(0, T)] * B))
    def extend(self, length, counts):
        shapes = (B, length, N, H), (B, length, K, H), (B, length, K, D)
        query, key, value = (self.random.standard_normal(x).astype("f") for x in shapes)
        counts = np.minimum(np.minimum(counts, length), LONGEST - self.length)
        counts = counts.astype(np.int32)
        output, self.kv = extend(self.kv, query, key, value, counts)
        for b, (at, count) in enumerate(zip(self.length, counts, strict=True)):
            self.key[b, at : at + count] = key[b, :count]
            self.value[b, at : at + count] = value[b, :count]
        key, value = np.nan_to_num(self.key), np.nan_to_num(self.value)
        want = definition(query, key, value, self.length, **self.kind)
        for b, count in enumerate(counts):
            np.testing.assert_allclose(output[b, :count], want[b, :count], atol=3e-6)
            assert not output[b, count:].any()
        self.length = self.length + counts
        assert (self.kv.length == self.length).all()

    @rule(which=st.tuples(*[st.integers(0, B - 1)] * B))
    def take(self, which):
        which = np.array(which)
        self.kv = self.kv.take(which)
        self.key, self.value = self.key[which], self.value[which]
        self.length = self.length[which]


@pytest.mark.parametrize(
    ("examples", "steps"), [(4, 8), pytest.param(60, 20, marks=pytest.mark.slow)]
)
def test_any_sequence_of_calls_is_that_of_lists(examples, steps):
    machines.run(Rolling, examples, steps)


class OtherRolling(Rolling):
    """One with a longer window and more sinks."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        self.start(seed, (7, 2))


@pytest.mark.slow
def test_any_sequence_of_calls_with_a_longer_window():
    run_state_machine_as_test(
        OtherRolling, settings=hypothesis.settings(max_examples=30, deadline=None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_prompt_may_be_longer_than_the_window(dtype):
    query, key, value = tokens(30)
    kv, outputs, at = caches.rolling(B, 6, K, H, D, sinks=2, dtype=dtype), [], 0
    for count in (15, 15):
        part = [x[:, at : at + count] for x in (query, key, value)]
        output, kv = extend(kv, *part, None)
        outputs.append(output)
        at += count
    key, value = rounded(dtype, key, value)
    want = definition(query, key, value, jnp.zeros(B, jnp.int32), window=6, sinks=2)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=3e-6)
    assert sorted(kv.key_position.tolist()) == [0, 1, *range(24, 30)]
    # One query sees the whole window after an append.
    last = kv.attend(query[:, -1:], mask=USER, sink=SINK, modifier=ALiBi())
    np.testing.assert_allclose(last, want[:, -1:], atol=3e-6)


@pytest.mark.slow
def test_gradients_of_a_rolling_cache():
    inputs = tokens(9)

    def through(query, key, value):
        kv, total = caches.rolling(B, 4, K, H, D, sinks=1), 0.0
        for first, last in ((0, 6), (6, 9)):
            part = [x[:, first:last] for x in (query, key, value)]
            output, kv = kv.extend(*part)
            total += jnp.sum(jnp.sin(output))
        return total

    def whole(query, key, value):
        everything = lambda b, n, t, s: jnp.bool_(True)
        mask = banded(4, 1, everything)
        return jnp.sum(jnp.sin(jattn.attention(query, key, value, mask=mask)))

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(*inputs) for f in (through, whole))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_rolling_cache_says_what_it_cannot():
    query, key, value = tokens(3)
    kv = caches.rolling(B, 4, K, H, D)
    rows = Causal() & Segments(jnp.zeros(3, int))
    for call, match in (
        (lambda: kv.attend(query), "3 queries of a rolling cache must see 4 keys each"),
        (lambda: kv.extend(query, key, value, bias=jnp.zeros((3, 4))), "`bias` must not"),
        (lambda: kv.extend(query, key, value, mask=rows), "`Segments` lies along slots"),
        (lambda: caches.rolling(B, 0, K, H), "`window` must be a whole number, at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "int4"])
def test_absorbed_attention_is_the_expanded_one(dtype):
    C, R, E, count = 6, 2, 5, 12  # sizes of latents, rotary keys and heads
    latent, rotary = draw(1, B, count, C), draw(2, B, count, R)
    query, turned = draw(3, B, count, N, E), draw(4, B, count, N, R)
    to_key, to_value = draw(5, N, E, C), draw(6, N, C, E)
    kv, outputs = caches.latent(B, 20, C, R, dtype=dtype, ragged=True), []
    absorbed = jnp.einsum("btne,nec->btnc", query, to_key)
    absorbed = jnp.concatenate([absorbed, turned], -1)
    step = jax.jit(lambda kv, *x: kv.extend(*x, scale=(E + R) ** -0.5, mask=Causal()))
    for first, last in ((0, 6), (6, 12)):
        part = [x[:, first:last] for x in (absorbed, latent, rotary)]
        output, kv = step(kv, *part)
        outputs.append(jnp.einsum("btnc,nce->btne", output, to_value))
    latent, rotary = kv.latent[:, :count], kv.rotary[:, :count]
    key = jnp.einsum("bsc,nec->bsne", latent, to_key)
    shared = jnp.broadcast_to(rotary[:, :, None], (B, count, N, R))
    value = jnp.einsum("bsc,nce->bsne", latent, to_value)
    want = jattn.definition.attention(
        jnp.concatenate([query, turned], -1),
        jnp.concatenate([key, shared], -1),
        value,
        mask=Causal(),
    )
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=2e-5)
    assert kv.truncate(3).take([1]).length.tolist() == [3]
    exact = kv.dequantize()
    np.testing.assert_array_equal(exact.latent, kv.latent)
    with pytest.raises(ValueError, match="`rotary` must have shape"):
        kv.append(latent, latent)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "int4"])
def test_rolling_cache_is_what_it_means_without_rounding(dtype):
    query, key, value = tokens(13)
    _, kv = caches.rolling(B, 6, K, H, D, sinks=2, dtype=dtype).extend(query, key, value)
    exact = kv.dequantize()
    assert exact.store.dtype == "float32"
    got, want = (x.attend(query[:, -1:], mask=USER) for x in (kv, exact))
    np.testing.assert_allclose(got, want, atol=1e-5)
