"""The decoding layers of each framework: pieces give what one causal call gives.

Each function below makes one framework's own layer, puts its parameters into ours, and
gives the causal output by the framework, and a way to decode.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is first imported

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Window

B, T, F, N, CAPACITY = 2, 7, 8, 4, 9
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, F)), jnp.float32)
PIECES = {"tokens": (1,) * T, "prompt": (5, 1, 1)}


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that the frameworks need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def close(got, want):
    np.testing.assert_allclose(got, want, atol=3e-6, rtol=1e-5)


def decoded(step, state, sizes, x=X):
    """Decodes pieces of these sizes by a compiled step (x, state) → (y, state)."""
    step, outputs, first = jax.jit(step), [], 0
    for size in sizes:
        output, state = step(x[:, first : first + size], state)
        outputs.append(output)
        first += size
    return jnp.concatenate(outputs, axis=1)


def check(step, empty, causal):
    """Compares both ways to cut the tokens, and the gradient of the tokens."""
    want, whole = causal(X), lambda x: jnp.sum(jnp.sin(causal(x)))
    for sizes in PIECES.values():
        close(decoded(step, empty, sizes), want)

    def loss(x):
        return jnp.sum(jnp.sin(decoded(step, empty, PIECES["prompt"], x)))

    gradient = jax.grad(loss)(X)
    np.testing.assert_allclose(gradient, jax.grad(whole)(X), atol=1e-5)


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")
    from jattn.adapters.nnx import MultiHeadAttention

    options = {"num_kv_heads": 2, "rngs": nnx.Rngs(0), "decode": False}
    theirs = nnx.MultiHeadAttention(N, F, **options)
    ours = MultiHeadAttention(N, F, **options)
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    close(ours(X), theirs(X))
    with pytest.raises(ValueError, match="call `init_cache` first"):
        ours(X, decode=True)
    ours.init_cache((B, CAPACITY, F))
    graph, cache, rest = nnx.split(ours, nnx.Cache, ...)

    def step(x, cache):
        layer = nnx.merge(graph, cache, rest)
        return layer(x, decode=True), nnx.state(layer, nnx.Cache)

    check(step, cache, lambda x: theirs(x, is_causal=True))
    # As flax's users write it, with the layer in `nnx.jit`.
    call = nnx.jit(lambda layer, x: layer(x, decode=True))
    got = jnp.concatenate([call(ours, X[:, :5]), call(ours, X[:, 5:])], 1)
    close(got, theirs(X, is_causal=True))
    assert int(ours.kv.get_value().length) == T


@pytest.mark.slow
def test_linen():
    linen = pytest.importorskip("flax.linen")
    from jattn.adapters.linen import MultiHeadDotProductAttention

    theirs = linen.MultiHeadDotProductAttention(N)
    variables = theirs.init(jax.random.key(0), X)
    close(MultiHeadDotProductAttention(N).apply(variables, X), theirs.apply(variables, X))
    ours = MultiHeadDotProductAttention(N, decode=True)
    made = ours.init(jax.random.key(0), jnp.zeros((B, CAPACITY, F)))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(made["params"]) == shapes(variables["params"])
    assert int(made["cache"]["kv"].length) == 0

    def step(x, cache):
        given = {"params": variables["params"], "cache": cache}
        y, changed = ours.apply(given, x, mutable="cache")
        return y, changed["cache"]

    mask = linen.make_causal_mask(X[..., 0])
    check(step, made["cache"], lambda x: theirs.apply(variables, x, mask=mask))


@pytest.mark.slow
def test_haiku():
    haiku = pytest.importorskip("haiku")
    from jattn.adapters.haiku import MultiHeadAttention

    options = {"w_init": haiku.initializers.VarianceScaling(), "name": "attention"}
    causal = np.tril(np.ones((T, T), bool))[None, None]
    theirs = haiku.transform(
        lambda x: haiku.MultiHeadAttention(N, 2, **options)(x, x, x, causal)
    )
    params = theirs.init(jax.random.key(0), X)
    decode = lambda x, capacity=None: MultiHeadAttention(N, 2, **options).extend(
        x, capacity=capacity, mask=Window(T, 0)
    )
    ours = haiku.transform_with_state(decode)
    made, state = ours.init(jax.random.key(0), X[:, :1], CAPACITY)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert int(state["attention"]["kv"].length) == 0
    step = lambda x, state: ours.apply(params, state, None, x)
    check(step, state, lambda x: theirs.apply(params, None, x))
    with pytest.raises(ValueError, match="`capacity` must say how many tokens"):
        ours.init(jax.random.key(0), X)


@pytest.mark.slow
def test_equinox():
    equinox = pytest.importorskip("equinox")
    from jattn.adapters.equinox import MultiheadAttention

    theirs = equinox.nn.MultiheadAttention(N, F, key=jax.random.key(0))
    ours = MultiheadAttention(N, F, key=jax.random.key(1))
    leaves = jax.tree.leaves(equinox.filter(theirs, equinox.is_array))
    arrays, rest = equinox.partition(ours, equinox.is_array)
    ours = equinox.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)
    causal = jnp.tril(jnp.ones((T, T), bool))
    whole = jax.vmap(lambda x: theirs(x, x, x, mask=causal))
    empty = jax.vmap(lambda _: ours.empty(CAPACITY))(X)
    check(jax.vmap(ours.extend), empty, whole)
    cut = lambda x, kv: ours.extend(x, kv, mask=lambda b, n, t, s: t - s < 2)
    window = causal & ~jnp.tril(causal, -2)
    want = jax.vmap(lambda x: theirs(x, x, x, mask=window))(X)
    close(decoded(jax.vmap(cut), empty, (5, 2)), want)


@pytest.mark.slow
@pytest.mark.filterwarnings(  # of keras's own variables
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
def test_keras():
    adapter = pytest.importorskip("jattn.adapters.keras")
    import keras

    theirs = keras.layers.MultiHeadAttention(N, 2, value_dim=2)
    causal = lambda x: theirs(x, x, use_causal_mask=True)
    want = causal(X)
    ours = adapter.MultiHeadAttention(N, 2, value_dim=2)
    with pytest.raises(ValueError, match="needs a layer that was built"):
        ours.extend(X, ours.empty(B, CAPACITY))
    ours.build(X.shape, X.shape)
    ours.set_weights(theirs.get_weights())
    check(ours.extend, ours.empty(B, CAPACITY), causal)
    close(ours(X, X, use_causal_mask=True), want)
    windowed = adapter.MultiHeadAttention(N, 2, value_dim=2, sliding_window=2)
    windowed.build(X.shape, X.shape)
    windowed.set_weights(theirs.get_weights())
    want = windowed(X, X, use_causal_mask=True)
    close(decoded(windowed.extend, windowed.empty(B, CAPACITY), (5, 2)), want)
