"""Decoding layers of flax: nothing that a layer was given is dropped in silence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Window
from jattn.modifiers import ALiBi

B, T, F, N = 2, 5, 8, 4
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, F)), jnp.float32)
# A sink and a scale too: each of them alone would change the numbers.
ADDED = {
    "modifier": ALiBi(),
    "and_mask": Window(1, 0),
    "sink": jnp.ones(N),
    "scale": 0.3,
    "query_position": 0,  # what the whole needs is not what a cache says
}


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that the frameworks need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def nnx_layer():
    nnx = pytest.importorskip("flax.nnx")
    from jattn.adapters import nnx as ours

    attend = functools.partial(ours.attention, **ADDED)
    options = {"decode": False, "rngs": nnx.Rngs(0), "attention_fn": attend}
    return ours.MultiHeadAttention(N, F, **options)


def test_nnx_decodes_by_what_a_partial_added():
    layer = nnx_layer()
    whole = layer(X, mask=Causal())
    layer.init_cache((B, T, F))
    parts = [layer(x, decode=True) for x in (X[:, :3], X[:, 3:4], X[:, 4:])]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)


def test_nnx_refuses_what_it_would_drop():
    layer = nnx_layer()
    with pytest.raises(ValueError, match="`count` must be left out unless"):
        layer(X, count=3)
    layer.init_cache((B, T, F))
    with pytest.raises(TypeError, match="unexpected keyword argument 'typo'"):
        layer(X, decode=True, typo=1)
    if "input_positions" in flaxs_parameters():
        with pytest.raises(ValueError, match="`input_positions` must be left out"):
            layer(X, decode=True, input_positions=jnp.arange(T))


def flaxs_parameters():
    import inspect

    from flax import nnx

    return inspect.signature(nnx.MultiHeadAttention.__call__).parameters


def test_linen_decodes_by_what_a_partial_added_and_sows_nothing():
    pytest.importorskip("flax.linen")
    from jattn.adapters import linen as ours

    attend = functools.partial(ours.attention, **ADDED)
    kind = functools.partial(ours.MultiHeadDotProductAttention, N, attention_fn=attend)
    layer = kind(decode=True)
    variables = layer.init(jax.random.key(0), X)
    whole = kind().apply({"params": variables["params"]}, X, mask=Causal())
    parts = []
    for x in (X[:, :3], X[:, 3:]):
        y, changed = layer.apply(variables, x, mutable=True, sow_weights=True)
        variables = variables | {"cache": changed["cache"]}
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)
    with pytest.raises(ValueError, match="`count` must be left out unless"):
        kind().apply({"params": variables["params"]}, X, count=3)
    with pytest.raises(ValueError, match="give `inputs_q` alone"):
        layer.apply(variables, X, inputs_kv=X, mutable="cache")
