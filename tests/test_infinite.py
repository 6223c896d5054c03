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


@pytest.mark.parametrize("name", ["definition", *NAMES])
def test_a_query_of_nan_leaves_the_values_that_it_does_not_see(name):
    query = QUERY.at[0, 0].set(np.nan)  # it sees the keys 0, 1 and 2
    weigh = jnp.ones((B, T, N, D))
    pull = jax.vjp(lambda value: attend(query, KEY, value, name), VALUE)[1]
    (found,) = pull(weigh)
    assert np.isnan(found[0, :3]).all()
    assert np.isfinite(found[0, 3:]).all()


BAD = {
    "a query of nan": (QUERY.at[0, 1, 0, 1].set(np.nan), KEY, VALUE),
    "an infinite query": (QUERY.at[0, 1, 0, 1].set(np.inf), KEY, VALUE),
    "a key of nan": (QUERY, KEY.at[0, 4, 0, 1].set(np.nan), VALUE),
    "a value of nan": (QUERY, KEY, VALUE.at[0, 4, 0, 1].set(np.nan)),
    "an infinite value": (QUERY, KEY, VALUE.at[0, 4, 0, 1].set(np.inf)),
}


@pytest.mark.parametrize("name", ["definition", *NAMES])
@pytest.mark.parametrize("bad", BAD)
def test_what_a_row_that_is_not_finite_pulls_back_is_not_finite(name, bad):
    """No gradient is a number where the definition has none, and the others are equal."""

    def pulled(name):
        output, pull = jax.vjp(lambda *xs: attend(*xs, name), *BAD[bad])
        return output, pull(jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    output, (d_query, d_key, d_value) = pulled(name)
    lost = ~np.isfinite(output).all(axis=-1)[0]  # TN
    assert lost.any()
    assert not lost.all()
    np.testing.assert_array_equal(~np.isfinite(d_query[0]), lost[..., None].repeat(H, -1))
    touched = (np.asarray(MASK) & lost.any(axis=-1)[:, None]).any(axis=0)  # S
    np.testing.assert_array_equal(~np.isfinite(d_key[0, :, 0]).all(axis=-1), touched)
    assert np.isfinite(d_value[0, ~touched]).all()
    _, wanted = pulled("definition")
    for got, want in zip((d_query, d_key, d_value), wanted, strict=True):
        both = np.isfinite(got) & np.isfinite(want)
        np.testing.assert_allclose(got[both], want[both], atol=1e-6)
        if not bad.endswith("query"):  # an infinite logit may have no weight, or be NaN
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_where_a_cotangent_is_not_finite_the_definition_says(name, bad):
    """Takes a loss whose derivative is NaN where the output is, and second derivatives."""
    tangents = draw(3, B, T, N, H), draw(4, B, S, 1, H), draw(5, B, S, 1, D)

    def pulled(name):
        gradient = jax.grad(lambda *xs: jnp.sum(jnp.sin(attend(*xs, name))), (0, 1, 2))
        return jax.jvp(gradient, BAD[bad], tangents)

    for results in zip(pulled(name), pulled("definition"), strict=True):
        for got, want in zip(*results, strict=True):
            lost = [~np.isfinite(x).all(axis=-1) for x in (got, want)]
            np.testing.assert_array_equal(*lost)
            both = np.isfinite(got) & np.isfinite(want)
            np.testing.assert_allclose(got[both], want[both], atol=1e-5)
