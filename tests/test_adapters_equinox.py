"""`jattn.adapters.equinox` equals equinox's own layer, and reads its parameters."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import definition
from jattn.masks import Causal
from jattn.modifiers import ALiBi

eqx = pytest.importorskip("equinox")
adapter = pytest.importorskip("jattn.adapters.equinox")

T, S, N, FEATURES = 4, 6, 4, 8
BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
ROTARY = eqx.nn.RotaryPositionalEmbedding(embedding_size=2)


def normal(*shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed + sum(shape))
    return jnp.asarray(rng.standard_normal(shape), dtype)


def booleans(*shape):
    """A mask whose first key counts for everyone."""
    mask = np.random.default_rng(2).random(shape) < 0.5
    mask[..., :1] = True
    return jnp.asarray(mask)


def assert_close(got, want, **tolerances):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerances))


def layer(cls, **options):
    return cls(N, FEATURES, key=jax.random.key(0), **options)


def rotate(query, key, value):
    turn = jax.vmap(ROTARY, in_axes=1, out_axes=1)
    return turn(query), turn(key), value


# How a layer is made, what it is called with, and the features of its inputs.
OPTIONS = {
    "plain": ({}, {}, (FEATURES,) * 3),
    "all_sizes_and_biases": (
        {"key_size": 5, "value_size": 3, "output_size": 7, "qk_size": 4, "vo_size": 6}
        | BIASES,
        {"mask": booleans(T, S)},
        (FEATURES, 5, 3),
    ),
    "mask_per_head": ({}, {"mask": booleans(N, T, S)}, (FEATURES,) * 3),
    "rotary": (
        {"dropout_p": 0.5},
        {"process_heads": rotate, "deterministic": None, "inference": True},
        (FEATURES,) * 3,
    ),
}


@pytest.mark.parametrize(("made", "given", "features"), OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_equal_those_of_equinox(made, given, features):
    arrays = [normal(n, size) for n, size in zip((T, S, S), features, strict=True)]

    @eqx.filter_jit
    def run(module):
        call = lambda module, arrays: jnp.sum(jnp.sin(module(*arrays, **given)))
        gradients = eqx.filter_grad(lambda both: call(*both))((module, arrays))
        return module(*arrays, **given), gradients

    ours, theirs = adapter.MultiheadAttention, eqx.nn.MultiheadAttention
    assert_close(run(layer(ours, **made)), run(layer(theirs, **made)))


def test_a_checkpoint_of_equinox_loads():
    file = io.BytesIO()
    theirs = layer(eqx.nn.MultiheadAttention, **BIASES)
    theirs = jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, theirs)
    eqx.tree_serialise_leaves(file, theirs)
    file.seek(0)
    ours = layer(adapter.MultiheadAttention, **BIASES)
    loaded = eqx.tree_deserialise_leaves(file, ours)
    assert_close(loaded, theirs, rtol=0, atol=0)
    x = normal(T, FEATURES)
    assert_close(loaded(x, x, x), theirs(x, x, x))


def test_grouped_heads_masks_and_modifiers_are_taken():
    module = layer(adapter.MultiheadAttention, num_kv_heads=2)
    x = normal(T, FEATURES)
    assert module.key_proj.weight.shape == module.value_proj.weight.shape == (4, FEATURES)
    options = {"mask": Causal(), "modifier": ALiBi()}
    heads = [
        jax.vmap(linear)(x).reshape(T, -1, 2)
        for linear in (module.query_proj, module.key_proj, module.value_proj)
    ]
    want = jax.jit(functools.partial(definition.attention, **options))(*heads)
    want = jax.vmap(module.output_proj)(want.reshape(T, -1))
    assert_close(module(x, x, x, **options), want)


def test_works_under_vmap_with_a_key_each():
    module = layer(adapter.MultiheadAttention, dropout_p=0.5)
    x = jnp.broadcast_to(normal(T, FEATURES), (2, T, FEATURES))
    run = jax.vmap(lambda x, key: module(x, x, x, key=key))
    first, second = run(x, jax.random.split(jax.random.key(1)))
    assert np.any(first != second)
    alone = module(x[0], x[0], x[0], key=jax.random.split(jax.random.key(1))[1])
    assert_close(second, alone)


def test_inference_mode_drops_nothing():
    module = layer(adapter.MultiheadAttention, dropout_p=0.5)
    x = normal(T, FEATURES)
    plain = layer(adapter.MultiheadAttention)(x, x, x)
    assert_close(eqx.nn.inference_mode(module)(x, x, x), plain)
    assert_close(module(x, x, x, deterministic=True), plain)


def test_dropout_drops_at_its_rate():
    """Values of one, in a layer that only counts them: what is kept of each query."""
    module = adapter.MultiheadAttention(1, 16, dropout_p=0.25, key=jax.random.key(0))
    eye, zero = jnp.eye(16), jnp.zeros((16, 16))
    weights = lambda m: [
        getattr(m, f"{name}_proj").weight for name in ("query", "value", "output")
    ]
    module = eqx.tree_at(weights, module, [zero, eye, eye])
    run = jax.jit(jax.vmap(lambda key: module(eye, eye, eye, key=key)))
    kept = np.asarray(run(jax.random.split(jax.random.key(2), 64)))
    np.testing.assert_allclose(kept[kept > 0], 1 / 16 / 0.75, rtol=1e-6)
    deviation = (0.25 * 0.75 / kept.size) ** 0.5
    assert abs(np.mean(kept == 0) - 0.25) < 4 * deviation


def test_a_query_that_sees_no_key_gives_zero():
    module, x = layer(adapter.MultiheadAttention), normal(T, FEATURES)
    mask = jnp.arange(T)[:, None] > jnp.zeros((1, T), jnp.int32)
    run = eqx.filter_value_and_grad(lambda m: jnp.sum(m(x, x, x, mask=mask)[0]))
    value, gradients = run(module)
    assert value == 0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ({"num_kv_heads": 3}, {}, "must be a multiple of `num_kv_heads`, got 3"),
        ({"num_kv_heads": "a"}, {}, "must be a multiple of `num_kv_heads`, got 'a'; give"),
        ({"dropout_p": 1.0}, {}, r"MultiheadAttention: `dropout_p` must .* got 1.0; give"),
        ({"dropout_p": 0.5}, {}, "equinox.MultiheadAttention: dropout at rate 0.5 needs"),
        ({}, {"process_heads": lambda q, k, v: (q, k, v[1:])}, "must keep the shapes"),
        ({}, {"mask": jnp.ones((T, 3))}, "must broadcast to NTS"),
    ],
)
def test_what_cannot_be_honoured_is_refused(made, given, message):
    x = normal(T, FEATURES)
    with pytest.raises(ValueError, match=message):
        layer(adapter.MultiheadAttention, **made)(x, x, x, **given)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0)])
def test_no_queries_and_no_keys_have_a_shape(T, S):
    x, y = normal(T, FEATURES), normal(S, FEATURES)
    output = layer(adapter.MultiheadAttention)(x, y, y)
    np.testing.assert_array_equal(output, jnp.zeros((T, FEATURES)))


def test_no_tokens_extend_to_no_outputs():
    module = layer(adapter.MultiheadAttention)
    output, kv = module.extend(normal(0, FEATURES), module.empty(8))
    assert output.shape == (0, FEATURES)
    assert kv.length == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_cache_of_a_layer_has_the_dtype_of_its_weights(dtype):
    with jax.enable_x64(dtype == "float64"):
        module = layer(adapter.MultiheadAttention, dtype=jnp.dtype(dtype))
        x = normal(T, FEATURES, dtype=dtype)
        output, kv = module.extend(x, module.empty(8))
        assert output.dtype == kv.key.dtype == dtype
        whole = module(x, x, x, mask=Causal())
        np.testing.assert_allclose(output, whole, atol=2 * jnp.finfo(dtype).eps)
