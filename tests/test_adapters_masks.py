"""A floating mask that is to be added means the opposite of one to be multiplied."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is first imported

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.adapters.jax_nn import dot_product_attention
from tests.helpers.draws import normal

X = normal(0, (1, 2, 1, 4))
ADDED = {
    "least": np.array([0.0, np.finfo(np.float32).min], np.float32),
    "infinite": np.array([0.0, -np.inf], np.float32),
    "small": np.array([0.0, -1e4], np.float16),
    "integer": np.array([0, -10_000]),
    "bfloat16": jnp.array([0.0, -1e9], jnp.bfloat16),
}


def linen(mask):
    pytest.importorskip("flax")
    from jattn.adapters import linen

    return linen.attention(X, X, X, mask=mask)


def nnx(mask):
    pytest.importorskip("flax")
    from jattn.adapters import nnx

    return nnx.attention(X, X, X, mask=mask)


def haiku(mask):
    hk = pytest.importorskip("haiku")
    from jattn.adapters.haiku import MultiHeadAttention

    def layer(x, mask):
        return MultiHeadAttention(1, 4, w_init=hk.initializers.Constant(0.1))(x, x, x, mask)

    return hk.transform(layer).init(jax.random.key(0), X[:, :, 0], mask)


def equinox(mask):
    pytest.importorskip("equinox")
    from jattn.adapters.equinox import MultiheadAttention

    layer = MultiheadAttention(1, 4, key=jax.random.key(0))
    return layer(X[0, :, 0], X[0, :, 0], X[0, :, 0], mask=mask)


def keras(mask):
    pytest.importorskip("keras")
    from jattn.adapters.keras import MultiHeadAttention

    mask = jnp.broadcast_to(mask, (1, 2, 2))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return MultiHeadAttention(1, 4)(X[:, :, 0], X[:, :, 0], attention_mask=mask)


@pytest.mark.parametrize("adapter", [linen, nnx, haiku, equinox, keras])
@pytest.mark.parametrize("name", ADDED)
def test_a_mask_to_be_added_is_refused(adapter, name):
    with pytest.raises(ValueError, match="a mask to be added to the logits belongs in"):
        adapter(ADDED[name])


@pytest.mark.parametrize("adapter", [linen, nnx])
def test_ones_and_zeros_count(adapter):
    got = adapter(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(got, jnp.broadcast_to(X[:, :1], X.shape), atol=1e-6)


def test_jax_nn_takes_no_floating_mask():
    with pytest.raises(ValueError, match="what is added to the logits belongs in `bias`"):
        dot_product_attention(X, X, X, mask=jnp.asarray(ADDED["least"]))
