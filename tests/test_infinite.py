"""Values and keys that are not finite, where a query sees them.

What is masked out touches nothing: tests/test_semantics.py. What is seen counts as it does
in the definition: an infinite value is infinite in its feature, a NaN is NaN there, and the
other features are what they are without it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.implementations import dispatch
from jattn.implementations.decode import Decode

B, T, S, N, H, D = 1, 3, 6, 2, 2, 3
NAMES = ("dense", "blockwise", "decode")


@pytest.fixture(scope="module", autouse=True)
def few_keys_are_enough():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.IMPLEMENTATIONS, "decode", Decode(least=1))
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


QUERY, KEY, VALUE = draw(0, B, T, N, H), draw(1, B, S, 1, H), draw(2, B, S, 1, D)
MASK = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + 2  # the last key is never seen


@functools.partial(jax.jit, static_argnames="name")
def attend(query, key, value, name):
    mask = lambda b, n, t, s: MASK[t, s]
    if name == "definition":
        return definition.attention(query, key, value, mask=mask)
    return jattn.attention(query, key, value, mask=mask, implementation=name)


def check(name, query=QUERY, key=KEY, value=VALUE):
    want = attend(query, key, value, "definition")
    np.testing.assert_allclose(attend(query, key, value, name), want, atol=1e-6)
    return np.asarray(want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_reaches_its_feature_alone(name, bad):
    found = check(name, value=VALUE.at[0, 1, 0, 0].set(bad).at[0, 4, 0, 2].set(-bad))
    assert not np.isfinite(found[..., 0]).any()
    assert np.isfinite(found[..., 1]).all()
    np.testing.assert_array_equal(np.isfinite(found[0, :, 0, 2]), [True, True, False])


@pytest.mark.parametrize("name", NAMES)
def test_infinite_values_of_both_signs_make_nan(name):
    value = VALUE.at[0, 0, 0, 1].set(np.inf).at[0, 4, 0, 1].set(-np.inf)
    found = check(name, value=value.at[0, 5].set(np.nan))
    assert np.isnan(found[0, 2, :, 1]).all()
    assert np.isposinf(found[0, :2, :, 1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_key_whose_logit_is_minus_infinity_has_no_weight(name):
    key = KEY.at[0, 1, 0, 0].set(-np.inf)
    found = check(name, jnp.abs(QUERY), key)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ["definition", "dense", "blockwise", "decode"])
def test_a_query_of_nan_leaves_the_values_that_it_does_not_see(name):
    query = QUERY.at[0, 0].set(np.nan)  # it sees the keys 0, 1 and 2
    weigh = jnp.ones((B, T, N, D))
    pull = jax.vjp(lambda value: attend(query, KEY, value, name), VALUE)[1]
    (found,) = pull(weigh)
    assert np.isnan(found[0, :3]).all()
    assert np.isfinite(found[0, 3:]).all()
