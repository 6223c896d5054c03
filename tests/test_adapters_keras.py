"""`jattn.adapters.keras` equals keras's own layer, and takes its weights."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is first imported

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Window

keras = pytest.importorskip("keras")
adapter = pytest.importorskip("jattn.adapters.keras")
theirs = keras.layers.MultiHeadAttention

B, T, S, N, H, FEATURES = 2, 4, 6, 2, 3, 5
# Of keras's own variables.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that keras needs, and the same weights in every run."""
    keras.utils.set_random_seed(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed + sum(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def booleans(*shape):
    """A mask whose first key counts for everyone."""
    mask = np.random.default_rng(2).random(shape) < 0.5
    mask[..., :1] = True
    return jnp.asarray(mask)


def assert_close(got, want, **tolerances):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerances))


def layer(cls, *shapes, weights=None, **options):
    module = cls(N, H, **options)
    module.build(*shapes)
    if weights is not None:
        module.set_weights(weights)
    return module


def values_and_gradients(module, arrays, given):
    """Output and, if asked for, weights; and gradients of weights and inputs."""
    variables = [x.value for x in module.trainable_variables]

    def call(variables, arrays):
        fixed = [x.value for x in module.non_trainable_variables]
        return module.stateless_call(variables, fixed, *arrays, **given)[0]

    @jax.jit
    def run(variables, arrays):
        output, pullback = jax.vjp(call, variables, arrays)
        cotangents = jax.tree.map(jnp.sin, output)
        return output, pullback(cotangents)

    return run(variables, arrays)


ROWS = jnp.arange(T) < jnp.array([[3], [4]])
COLUMNS = jnp.arange(S) < jnp.array([[2], [6]])
# How a layer is made, what it is called with, and the axes of positions.
OPTIONS = {
    "causal": ({"use_bias": False}, {"use_causal_mask": True}, (T,), (S,)),
    "window": ({"sliding_window": 2, "use_gate": True}, {}, (T,), (T,)),
    "mask": ({"output_shape": 7}, {"attention_mask": booleans(B, T, S)}, (T,), (S,)),
    "mask_of_numbers_and_weights": (
        {"dropout": 0.5, "value_dim": 4},
        {
            "attention_mask": booleans(B, N, T, S).astype(jnp.float32),
            "return_attention_scores": True,
        },
        (T,),
        (S,),
    ),
    "one_axis_of_two": (
        {"attention_axes": 2},
        {"attention_mask": booleans(B, T, S), "return_attention_scores": True},
        (3, T),
        (3, S),
    ),
    "first_axis_of_two": ({"attention_axes": 1}, {}, (T, 3), (S, 3)),
    "two_axes": (
        {},
        {"attention_mask": booleans(B, T, 2, S, 2), "return_attention_scores": True},
        (T, 2),
        (S, 2),
    ),
}


@pytest.mark.parametrize(
    ("made", "given", "rows", "columns"), OPTIONS.values(), ids=OPTIONS
)
def test_output_and_gradients_equal_those_of_keras(made, given, rows, columns):
    arrays = [normal(B, *rows, FEATURES), normal(B, *columns, FEATURES, seed=1)]
    shapes = [x.shape for x in arrays]
    want = layer(theirs, *shapes, **made)
    got = layer(adapter.MultiHeadAttention, *shapes, weights=want.get_weights(), **made)
    assert_close(*(values_and_gradients(x, arrays, given) for x in (got, want)))


def test_masks_of_keras_are_honoured():
    """Padding on both sides: rows that count equal those of keras."""
    x = normal(B, T, FEATURES)
    want = layer(theirs, x.shape, x.shape)
    got = layer(adapter.MultiHeadAttention, x.shape, x.shape, weights=want.get_weights())

    def run(module):
        masked = keras.layers.Masking()(x * ROWS[..., None])
        return module(masked, masked, use_causal_mask=True)

    seen = ROWS[..., None]
    assert_close(run(got) * seen, run(want) * seen)


def test_a_model_loads_weights_of_keras_and_is_saved(tmp_path):
    def model(cls):
        inputs = keras.Input((T, FEATURES))
        return keras.Model(inputs, cls(N, H)(inputs, inputs, use_causal_mask=True))

    want, got = model(theirs), model(adapter.MultiHeadAttention)
    want.save_weights(tmp_path / "w.weights.h5")
    got.load_weights(tmp_path / "w.weights.h5")
    x = normal(B, T, FEATURES)
    assert_close(got(x), want(x))
    got.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert type(loaded.layers[-1]) is adapter.MultiHeadAttention
    assert_close(loaded(x), want(x))


def test_masks_of_this_library_are_taken():
    x = normal(B, T, FEATURES)
    module = layer(adapter.MultiHeadAttention, x.shape, x.shape)
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    want = module(x, x, attention_mask=(s <= t) & (t - s <= 1))
    assert_close(module(x, x, attention_mask=Causal() & Window(1, 0)), want)
    near = lambda b, n, t, s: t - s <= 1
    assert_close(module(x, x, attention_mask=near, use_causal_mask=True), want)


def test_causal_is_along_the_attention_axis():
    x = normal(B, 3, T, FEATURES)
    module = layer(adapter.MultiHeadAttention, x.shape, x.shape, attention_axes=2)
    each = [
        module(x[:, i : i + 1], x[:, i : i + 1], use_causal_mask=True) for i in range(3)
    ]
    got = module(x, x, use_causal_mask=True)
    assert_close(got, jnp.concatenate(each, axis=1))
    assert_close(
        got[..., :2, :], module(x[..., :2, :], x[..., :2, :], use_causal_mask=True)
    )


def test_dropout_drops_at_its_rate_in_training_alone():
    x = jnp.eye(16)[None]
    module = adapter.MultiHeadAttention(1, 16, dropout=0.25, use_bias=False, seed=3)
    module.build(x.shape, x.shape)
    query, key, value, output = module.get_weights()
    eye = np.eye(16, dtype=np.float32)
    module.set_weights(
        [0 * query, key, eye.reshape(value.shape), eye.reshape(output.shape)]
    )
    kept = np.concatenate([module(x, x, training=True) for _ in range(32)])
    np.testing.assert_allclose(kept[kept > 0], 1 / 16 / 0.75, rtol=1e-6)
    deviation = (0.25 * 0.75 / kept.size) ** 0.5
    assert abs(np.mean(kept == 0) - 0.25) < 4 * deviation
    assert_close(module(x, x), jnp.full_like(x, 1 / 16))
    output, weights = module(x, x, training=True, return_attention_scores=True)
    assert_close(weights, jnp.full((1, 1, 16, 16), 1 / 16))


def test_a_query_that_sees_no_key_gives_zero():
    x = normal(1, T, FEATURES)
    module = layer(adapter.MultiHeadAttention, x.shape, x.shape, use_bias=False)
    mask = jnp.arange(T)[:, None] > jnp.zeros(T)
    assert not np.any(module(x, x, attention_mask=mask[None])[0, 0])


def test_what_cannot_be_honoured_is_refused():
    x = normal(B, T, 2, FEATURES)
    module = layer(adapter.MultiHeadAttention, x.shape, x.shape)
    with pytest.raises(ValueError, match="need one attention axis"):
        module(x, x, use_causal_mask=True)
    with pytest.raises(ImportError, match="needs keras on its JAX backend, got numpy"):
        adapter._check_backend("numpy")


def test_public_names_are_these():
    assert adapter.__all__ == ["MultiHeadAttention"]


@pytest.mark.parametrize("given", [{}, {"return_attention_scores": True}])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (0, 0)])
def test_batches_of_one_and_of_none_are_those_of_keras(sizes, given):
    arrays = normal(sizes[0], T, FEATURES), normal(sizes[1], S, FEATURES)
    shapes = [x.shape for x in arrays]
    # Its own fused attention asks for equal batches; so it computes weights first.
    module = layer(theirs, *shapes, dropout=0.5)
    ours = layer(adapter.MultiHeadAttention, *shapes, weights=module.get_weights())
    assert_close(ours(*arrays, **given), module(*arrays, **given))
