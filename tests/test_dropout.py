"""Dropout as a pure function of seed, example, head and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Dropout, caches
from jattn.counted import counted_from
from jattn.implementations import dispatch
from tests.helpers.draws import normal

QUERY = normal(0, (2, 6, 4, 8))


def kept(query=QUERY, key=QUERY, rate=0.5, seed=1, **options):
    """Says which weights are not zero, BNTS."""
    dropout = Dropout(rate, jax.random.key(seed))
    weights = jattn.attention_weights(query, key, dropout=dropout, **options)
    return np.asarray(weights) > 0


def test_dropout_repeats_with_the_same_seed():
    np.testing.assert_array_equal(kept(), kept())


def test_dropout_differs_with_another_seed():
    assert np.mean(kept() != kept(seed=2)) > 0.3


def test_dropout_is_the_same_with_and_without_x64():
    with jax.enable_x64(True):
        wide = kept()
    np.testing.assert_array_equal(kept(), wide)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate(rate):
    query = jnp.zeros((1, 256, 4, 1))
    share = 1 - kept(query, query, rate).mean()
    deviation = (rate * (1 - rate) / (4 * 256 * 256)) ** 0.5
    assert abs(share - rate) <= 5 * deviation


def test_dropout_is_even_over_rows_columns_and_diagonals():
    query = jnp.zeros((1, 512, 1, 1))
    mask = kept(query, query)[0, 0]
    deviation = 0.5 / 512**0.5
    for axis in (0, 1):
        assert np.abs(mask.mean(axis) - 0.5).max() < 5 * deviation
    shifted = np.stack([np.roll(row, -i) for i, row in enumerate(mask)])
    assert np.abs(shifted.mean(0) - 0.5).max() < 5 * deviation


def test_dropout_of_neighbours_is_independent():
    query = jnp.zeros((1, 512, 1, 1))
    mask = kept(query, query)[0, 0] - 0.5
    for other in (mask[1:, :], mask[:, 1:], mask[1:, 1:]):
        both = (mask[: other.shape[0], : other.shape[1]] * other).mean() * 4
        assert abs(both) < 5 / 512


def test_dropout_differs_between_examples_and_heads():
    query = jnp.zeros((2, 64, 2, 1))
    masks = kept(query, query).reshape(4, -1)
    agree = (masks[:, None] == masks[None]).mean(-1)
    assert np.abs(agree[~np.eye(4, dtype=bool)] - 0.5).max() < 0.1


def test_dropout_scales_what_it_keeps():
    weights = jattn.attention_weights(QUERY, QUERY)
    dropped = jattn.attention_weights(
        QUERY, QUERY, dropout=Dropout(0.25, jax.random.key(1))
    )
    expected = np.where(dropped > 0, weights / 0.75, 0)
    np.testing.assert_allclose(dropped, expected, rtol=1e-6)


def test_dropout_of_some_rows_is_that_of_the_whole():
    np.testing.assert_array_equal(kept(rows=[4, 1]), kept()[:, :, jnp.array([4, 1])])


def test_dropout_goes_with_positions():
    part = kept(QUERY[:, 2:], QUERY[:, 3:], query_position=2, key_position=3)
    np.testing.assert_array_equal(part, kept()[:, :, 2:, 3:])


@pytest.mark.parametrize("kind", [np.array, np.float32, jnp.array, jnp.bfloat16])
def test_a_rate_is_a_number_of_any_kind(kind):
    dropout = Dropout(kind(0.5), jax.random.key(1))
    assert dropout == Dropout(0.5, dropout.rng)
    assert type(dropout.rate) is float


def test_a_traced_rate_is_refused():
    message = r"`rate` must be a Python number in \[0, 1\), got .*Tracer"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda rate: kept(rate=rate))(0.5)


def test_a_key_counts_as_used_once():
    attend = lambda rng, x: jattn.attention(x, x, x, dropout=Dropout(0.5, rng)).sum()
    x = normal(0, (1, 4, 1, 4))
    with jax.debug_key_reuse(True):
        for function in (attend, jax.jit(attend), jax.jit(jax.grad(attend, argnums=1))):
            function(jax.random.key(0), x)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda rng: attend(rng, x) + attend(rng, 2 * x))(jax.random.key(0))


def test_a_key_counts_as_used_once_by_a_cache():
    query, token = normal(0, (2, 5, 4, 8)), normal(1, (2, 5, 2, 8))
    empty = caches.empty(2, 8, 2, 8), caches.rolling(2, 3, 2, 8, sinks=1)
    with jax.debug_key_reuse(True):
        for kv in empty:
            kv.extend(query, token, token, dropout=Dropout(0.3, jax.random.key(0)))


def test_dropout_of_rate_zero_changes_nothing():
    got = jattn.attention(QUERY, QUERY, QUERY, dropout=Dropout(0.0, jax.random.key(1)))
    np.testing.assert_array_equal(got, jattn.attention(QUERY, QUERY, QUERY))


def test_dropout_leaves_the_logsumexp():
    state = jattn.attention_state(
        QUERY, QUERY, QUERY, dropout=Dropout(0.5, jax.random.key(1))
    )
    plain = jattn.attention_state(QUERY, QUERY, QUERY)
    np.testing.assert_array_equal(state.logsumexp, plain.logsumexp)


def test_dropout_takes_raw_and_typed_keys():
    raw = Dropout(0.5, jax.random.key_data(jax.random.key(1)))
    weights = jattn.attention_weights(QUERY, QUERY, dropout=raw)
    np.testing.assert_array_equal(np.asarray(weights) > 0, kept())


def test_dropout_seed_can_be_mapped():
    rngs = jax.random.split(jax.random.key(3), 4)
    run = lambda rng: jattn.attention(QUERY, QUERY, QUERY, dropout=Dropout(0.5, rng))
    mapped = jax.vmap(run)(rngs)
    np.testing.assert_allclose(mapped[2], run(rngs[2]), atol=1e-6)


def test_shared_dropout_is_that_of_the_first_head_everywhere():
    dropout = Dropout(0.5, jax.random.key(1), shared=True)
    mask = np.asarray(jattn.attention_weights(QUERY, QUERY, dropout=dropout)) > 0
    np.testing.assert_array_equal(mask, np.broadcast_to(kept()[:1, :1], mask.shape))


@pytest.mark.parametrize("name", dispatch.DEFAULT_ORDER)
def test_shared_dropout_equals_the_definition(name):
    dropout = Dropout(0.5, jax.random.key(1), shared=True)
    got = jattn.attention(QUERY, QUERY, QUERY, dropout=dropout, implementation=name)
    want = jattn.definition.attention(QUERY, QUERY, QUERY, dropout=dropout)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_numbers_of_examples_and_heads_add_up():
    query, dropout = jnp.zeros((3, 4, 2, 4)), Dropout(0.5, jax.random.key(0))
    whole = jattn.attention_weights(query, query, dropout=dropout)
    counted = counted_from(counted_from(dropout, b=1), b=1, n=1)
    part = jattn.attention_weights(query[2:, :, 1:], query[2:, :, 1:], dropout=counted)
    np.testing.assert_array_equal(part, whole[2:, 1:])
