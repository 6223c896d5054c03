"""Derivatives of a few queries, whose heads are folded into one product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.helpers.draws import normal

# Logits of 1e8 are 8 apart: weights of others than their maximum are 0, or far above 1.
SIZE, N, H = 1e8, 4, 8


def inputs(T, S, K, dtype="float32"):
    sizes = (2, T, N, H), (2, S, K, H), (2, S, K, H)
    query, key, value = (normal(i, x).astype(dtype) for i, x in enumerate(sizes))
    return query * jnp.asarray(SIZE, dtype), key, value


@pytest.mark.parametrize("mask", [None, lambda b, n, t, s: s < 90], ids=["all", "hides"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("S", [5, 600])
@pytest.mark.parametrize(("T", "K"), [(1, 2), (1, 4), (3, 2), (8, 4)])
def test_values_have_the_slopes_of_dense_where_heads_are_folded(T, K, S, dtype, mask):
    query, key, value = inputs(T, S, K, dtype)

    @functools.partial(jax.jit, static_argnames="name")
    def slopes(value, name):
        attend = functools.partial(jattn.attention, mask=mask, implementation=name)
        output = lambda value: attend(query, key, value)
        loss = lambda value: jnp.sum(output(value).astype("float32") ** 2)
        tangent = jax.jvp(output, (value,), (key,))[1]
        return jax.grad(loss)(value), tangent

    for name in ("blockwise", None):  # None: by chunks, with a mask
        for got, want in zip(slopes(value, name), slopes(value, "dense"), strict=True):
            got, want = (np.asarray(x).astype("float32") for x in (got, want))
            near = float(jnp.finfo(dtype).eps) * np.max(np.abs(want))
            np.testing.assert_allclose(got, want, atol=near)


@pytest.mark.parametrize("mask", [None, lambda b, n, t, s: s < 90], ids=["all", "hides"])
@pytest.mark.parametrize(("T", "K"), [(1, 2), (1, 4), (3, 2)])
def test_views_give_no_weight_above_one(T, K, mask):
    query, key, _ = inputs(T, 600, K)
    weights = jattn.attention_weights(query, key, mask=mask)
    received = jattn.attention_received(query, key, mask=mask)
    np.testing.assert_allclose(received, jnp.swapaxes(jnp.sum(weights, 2), 1, 2), atol=1e-6)
    entropy = jattn.attention_entropy(query, key, mask=mask)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)
    largest = jattn.strongest_keys(query, key, 1, mask=mask).weights
    np.testing.assert_allclose(largest, 1, atol=1e-6)
