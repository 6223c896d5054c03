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


# As many examples, heads, queries and keys: what lacks leading axes could be meant in two
# ways, and is read by its last axes, as in these libraries.
SQUARE = [normal(seed, (3, 3, 3, 4)) for seed in range(3)]
FEWER = {"by_head": (3, 3, 3), "by_query": (3, 3), "by_key": (3,)}


def of_jax_nn(name):
    return dot_product_attention, jax.nn.dot_product_attention


def of_flax(name):
    nn = pytest.importorskip(f"flax.{name}")
    ours = pytest.importorskip(f"jattn.adapters.{name}")
    return ours.attention, nn.dot_product_attention


@pytest.mark.parametrize("name", ["nnx", "linen", "jax_nn"])
@pytest.mark.parametrize("shape", FEWER.values(), ids=FEWER)
@pytest.mark.parametrize("kind", ["mask", "bias", "whole_bias"])
def test_what_lacks_leading_axes_is_read_as_there(name, shape, kind):
    ours, theirs = (of_jax_nn if name == "jax_nn" else of_flax)(name)
    given = jnp.arange(27).reshape(3, 3, 3)[(0,) * (3 - len(shape))] % 4
    kinds = {"mask": given != 1, "bias": given / 2, "whole_bias": given}
    options = {kind.removeprefix("whole_"): kinds[kind]}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = theirs(*SQUARE, **options)
        got = ours(*SQUARE, **options)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_haiku_reads_a_mask_by_head_as_there():
    hk = pytest.importorskip("haiku")
    from jattn.adapters.haiku import MultiHeadAttention

    def module(cls):
        run = lambda x, mask: cls(3, 4, w_init=hk.initializers.Constant(0.1))(x, x, x, mask)
        return hk.without_apply_rng(hk.transform(run))

    x, mask = SQUARE[0][:, 0], jnp.arange(27).reshape(3, 3, 3) % 4 != 1
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # In haiku itself a mask has all axes of the logits.
        parameters = module(hk.MultiHeadAttention).init(jax.random.key(0), x, mask[None])
        want = module(hk.MultiHeadAttention).apply(parameters, x, mask[None])
        got = module(MultiHeadAttention).apply(parameters, x, mask)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_mask_that_does_not_fit_is_still_told_how():
    message = r"got shape \(2, 5\); write `array\[:, None, None\]`"
    query, key = normal(0, (2, 3, 1, 4)), normal(1, (2, 5, 1, 4))
    with pytest.raises(ValueError, match=message):
        dot_product_attention(query, key, key, mask=jnp.ones((2, 5), bool))


def test_jax_nn_takes_no_floating_mask():
    with pytest.raises(ValueError, match="what is added to the logits belongs in `bias`"):
        dot_product_attention(X, X, X, mask=jnp.asarray(ADDED["least"]))
