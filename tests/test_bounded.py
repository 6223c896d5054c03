"""Steps whose masks are bounds of the logits: the definition's numbers, NaN and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches
from jattn.implementations import bounded
from jattn.masks import Causal, Lengths, Window, as_mask
from tests.helpers.small_chunks import small_chunks as small_chunks

B, S, N, K, H, T = 3, 12, 4, 2, 8, 2
MASKS = {
    "all": None,
    "causal": Causal(),
    "window": Causal() & Window(2, 0),
    "by head": lambda b, n, t, s: (s + n) % 3 > 0,
    "by query": lambda b, n, t, s: t % 2 == 0,
}


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """Notes each call of the way that is tested here."""
    calls, plain = [], bounded.sums
    monkeypatch.setattr(bounded, "sums", lambda *x: (calls.append(x), plain(*x))[1])
    jax.clear_caches()
    yield calls
    assert calls


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def arrays():
    return draw(0, B, T, N, H), draw(1, B, S, K, H), draw(2, B, S, K, H)


def by_cache(query, key, value, lengths, **options):
    kv = caches.empty(B, S, K, H, ragged=True).append(key, value, count=lengths)
    return kv.attend(query, **options)


def asked(lengths, mask=None, **options):
    """The options of a call on all slots."""
    lengths = jnp.asarray(lengths)
    seen = Lengths(lengths) if mask is None else Lengths(lengths) & as_mask(mask)
    position = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]
    return options | {"mask": seen, "query_position": position}


def by_definition(query, key, value, lengths, mask=None, **options):
    options = asked(lengths, mask, **options)
    return jattn.definition.attention(query, key, value, **options)


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_each_row_is_that_of_the_definition(mask):
    lengths = np.array([S, 9, 0], np.int32)  # the last example sees nothing
    inputs = *arrays(), lengths
    assert_same(by_cache(*inputs, mask=MASKS[mask]), by_definition(*inputs, MASKS[mask]))
    query, key, value = arrays()
    kv = caches.empty(B, S, K, H, ragged=True).append(key, value, count=lengths)
    options = asked(lengths, MASKS[mask], implementation="dense")
    want = jattn.attention_state(query, key, value, **options)
    assert_same(kv.attend_state(query, mask=MASKS[mask]), want)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", [1, 2], ids=["key", "value"])
def test_what_is_hidden_touches_nothing_and_what_is_seen_does(array, number):
    inputs = arrays()
    inputs[array][0, S - 1] = number  # the last query alone may see it
    inputs[array][1, 0, 0, 0] = number
    lengths = np.array([S, S, S], np.int32)
    got = by_cache(*inputs, lengths, mask=Causal())
    assert_same(got, by_definition(*inputs, lengths, Causal()))
    assert not np.isfinite(got[0, 1]).all()
    assert np.isfinite(got[0, 0]).all()
    assert np.isfinite(got[1, :, 2:]).all()  # of the other key head


def test_a_row_that_sees_nothing_may_begin_with_nan():
    query, key, value = arrays()
    key[0], lengths = np.nan, np.array([0, S, 9], np.int32)
    kv = caches.empty(B, S, K, H, ragged=True).append(key, value, count=np.full(B, S))
    got = kv.truncate(lengths).attend(query, mask=Causal())
    assert_same(got, by_definition(query, key, value, lengths, Causal()))


def test_a_hidden_key_touches_no_sum_where_values_have_no_numbers(ways):
    ways.append("none")  # values show no NaN there, so this way is not taken
    query, key, value = arrays()
    kv = caches.empty(B, S, K, H, 0)
    hidden = lambda b, n, t, s: s != 1
    want = kv.append(key, value[..., :0]).attend_state(query, mask=hidden)
    key[:, 1] = np.nan
    assert_same(kv.append(key, value[..., :0]).attend_state(query, mask=hidden), want)
    assert np.isfinite(want.logsumexp).all()


def test_slots_that_no_token_has_hold_nothing(ways):
    ways.append("none")  # attends to nothing
    key = draw(0, B, 4, K, H)
    key[:, 2:] = np.nan
    ragged = caches.empty(B, S, K, H, ragged=True).append(key, key, count=np.full(B, 2))
    full = caches.empty(B, S, K, H).append(*[draw(1, B, S - 2, K, H)] * 2)
    over = jax.jit(lambda kv, key: kv.append(key, key))(full, draw(2, B, 4, K, H))
    for kv in (ragged, over):
        assert not kv.store.keys[..., S:].any()
        assert not kv.store.values[..., S:, :].any()


def test_a_bias_may_hide_all_that_a_mask_leaves():
    bias = np.zeros((1, N, T, S), "float32")
    bias[:, 1], bias[:, 2, 1, 3:] = -np.inf, 2.5
    inputs = *arrays(), np.array([S, 10, 0], np.int32)
    got = by_cache(*inputs, bias=bias, mask=Causal())
    assert_same(got, by_definition(*inputs, Causal(), bias=bias))


def test_mapped_by_vmap_in_two_ways():
    query, key, value = arrays()
    lengths = np.array([S, 9, 11], np.int32)
    kv = caches.empty(B, S, K, H, ragged=True).append(key, value, count=lengths)
    queries = np.stack([query, 2 * query])
    want = np.stack([kv.attend(x, mask=Causal()) for x in queries])
    attend = lambda kv, query: kv.attend(query, mask=Causal())
    assert_same(jax.vmap(attend, (None, 0))(kv, queries), want)
    pairs = jax.tree.map(lambda x: jnp.stack([x, x]), kv)
    assert_same(jax.vmap(attend)(pairs, queries), want)


def test_a_gradient_is_that_of_the_definition():
    inputs, lengths = arrays(), np.array([S, 9, 11], np.int32)
    loss = lambda way: lambda *x: jnp.sum(jnp.sin(way(*x, lengths, mask=Causal())))
    got = jax.grad(loss(by_cache), argnums=(0, 1, 2))(*inputs)
    assert_same(got, jax.grad(loss(by_definition), argnums=(0, 1, 2))(*inputs))


def test_slots_beyond_the_capacity_stay_empty():
    query, key, value = arrays()
    key[1, 9:], value[1, 9:] = np.nan, np.nan  # padding
    lengths = np.array([S, 9, 11], np.int32)
    ragged = caches.empty(B, S, K, H, ragged=True).append(key, value, count=lengths)
    assert np.isfinite(ragged.attend(query)).all()
    flat = caches.empty(B, S, K, H).append(key, value)
    over = jax.jit(lambda kv: kv.append(key[:, :2], value[:, :2]))(flat)
    late = jax.jit(lambda kv: kv.truncate(S - 1).append(key[:, :2], value[:, :2]))(flat)
    for kv in (ragged, flat, over, late):
        assert kv.store.more > 0
        assert not np.any(kv.store.keys[..., S:])
        assert not np.any(kv.store.values[..., S:, :])
    np.testing.assert_array_equal(late.value[:, S - 1], value[:, 0])
