"""`jattn.adapters.nnx` equals flax's own attention where that is right."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.masks import Causal, Window
from jattn.modifiers import ALiBi, SoftCap

nnx = pytest.importorskip("flax.nnx")
adapter = pytest.importorskip("jattn.adapters.nnx")
# What compiles fastest; `OPTIONS` and `LAYERS` have a case each of the default.
attention = functools.partial(adapter.attention, implementation="dense")

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3
FEATURES = N * H


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that flax needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


defined = jax.jit(definition.attention)


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
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerances))


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(function, *arrays):
    output, pullback = jax.vjp(function, *arrays)
    return output, pullback(
        jnp.sin(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape)
    )


BOTH = {"bias": normal(1, N, T, S), "mask": booleans(B, 1, T, S), "is_causal": True}
# The batch axes, and what is given besides query, key and value.
OPTIONS = {
    "two_batch_axes": ((2, 1), {"mask": booleans(2, 1, 1, 1, S)}),
    "no_batch_axis": ((), {"mask": booleans(N, T, S).astype(jnp.float32)}),
    "bias_mask_causal": ((B,), BOTH),
    "deterministic": ((B,), {"dropout_rate": 0.5, "deterministic": True, **BOTH}),
    "default": ((B,), {"is_causal": True}),
}


@pytest.mark.parametrize(("batch", "options"), OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_equal_those_of_flax(batch, options):
    shapes = (*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, H)
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours = attention if "mask" in options else adapter.attention
    both = (functools.partial(f, **options) for f in (ours, nnx.dot_product_attention))
    got, want = (values_and_gradients(f, *arrays) for f in both)
    assert_close(got, want)


def test_gradient_of_the_bias_equals_that_of_flax():
    arrays = [normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, H, seed=2)]
    bias = normal(1, N, T, S)
    ours = lambda bias: attention(*arrays, bias)
    theirs = lambda bias: nnx.dot_product_attention(*arrays, bias)
    got, want = (values_and_gradients(f, bias) for f in (ours, theirs))
    assert_close(got, want)


def test_takes_what_flax_takes_in_its_order():
    theirs = inspect.signature(nnx.dot_product_attention).parameters
    ours = inspect.signature(adapter.attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def layer(attention_fn=None, **options):
    options |= {} if attention_fn is None else {"attention_fn": attention_fn}
    options = {"decode": False, "num_kv_heads": K} | options
    return nnx.MultiHeadAttention(N, FEATURES, rngs=nnx.Rngs(0), **options)


LAYERS = {
    "mask_of_ones_and_zeros": ({}, {"mask": booleans(B, 1, T, T).astype(jnp.float32)}),
    "causal": ({"normalize_qk": True, "num_kv_heads": N}, {"is_causal": True}),
}


@pytest.mark.parametrize(("options", "given"), LAYERS.values(), ids=LAYERS)
def test_layer_keeps_parameters_outputs_and_gradients(options, given):
    x = normal(B, T, FEATURES)

    def run(attention_fn):
        graph, parameters, rest = nnx.split(layer(attention_fn, **options), nnx.Param, ...)
        call = lambda parameters, x: nnx.merge(graph, parameters, rest)(x, **given)
        return parameters, *values_and_gradients(call, parameters, x)

    assert_close(run(attention if "mask" in given else adapter.attention), run(None))


def test_half_precision_is_no_less_exact_than_in_flax():
    arrays = [normal(B, T, N, H, dtype="bfloat16", seed=i) for i in range(3)]
    exact = nnx.dot_product_attention(*(x.astype(jnp.float32) for x in arrays))
    # With dropout, though it is off, flax takes the path that rounds.
    options = {"dropout_rate": 0.5, "deterministic": True}
    got, want = (f(*arrays, **options) for f in (attention, nnx.dot_product_attention))
    assert got.dtype == want.dtype
    error = lambda x: np.max(np.abs(np.float32(x) - np.float32(exact)))
    assert error(got) <= error(want)


def test_dtype_is_that_of_the_computation():
    arrays = [normal(T, N, H, seed=i) for i in range(3)]
    got = attention(*arrays, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    assert_close(got, attention(*narrow), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGHEST, ("high",) * 2])
def test_precision_is_that_of_the_products(precision):
    call = lambda x: attention(x, x, x, precision=precision)
    program = jax.jit(call).lower(normal(T, N, H)).as_text()
    name = str(precision if isinstance(precision, str) else "high").upper()
    assert program.count(name) >= program.count("stablehlo.dot_general") > 0


def test_weights_are_sown():
    x, mask = normal(B, T, N, H), booleans(B, 1, T, T)
    sown = []
    for function in (attention, nnx.dot_product_attention):
        module = layer()
        call = lambda module, function=function: function(x, x, x, mask=mask, module=module)
        sown.append(nnx.capture(call, nnx.Intermediate)(module))
    assert_close(*(jax.tree.leaves(one) for one in sown))


# Dropout.


def dropped(broadcast, rate=0.5, seed=0):
    """Says which weights a layer's dropout drops, BTNS."""
    query = key = jnp.zeros((3, 16, 2, 1))
    value = jnp.broadcast_to(jnp.eye(16)[:, None], (3, 16, 2, 16))
    options = {"dropout_rate": rate, "dropout_rng": jax.random.key(seed)}
    output = attention(query, key, value, broadcast_dropout=broadcast, **options)
    kept = np.unique(np.asarray(output))
    np.testing.assert_allclose(kept[kept > 0], 1 / 16 / (1 - rate), rtol=1e-6)
    return np.asarray(output) == 0


def test_broadcast_dropout_is_alike_in_all_examples_and_heads():
    drops = dropped(broadcast=True)
    np.testing.assert_array_equal(drops, np.broadcast_to(drops[:1, :, :1], drops.shape))
    assert np.mean(drops != dropped(broadcast=True, seed=1)) > 0.3


def test_dropout_without_broadcast_differs_between_examples_and_heads():
    drops = np.moveaxis(dropped(broadcast=False), 2, 1).reshape(6, -1)
    agree = (drops[:, None] == drops[None]).mean(-1)[~np.eye(6, dtype=bool)]
    assert np.abs(agree - 0.5).max() < 0.2


def test_a_rate_of_zero_needs_no_key_as_an_array():
    x = normal(T, N, H)
    assert_close(attention(x, x, x, dropout_rate=jnp.float32(0)), attention(x, x, x))


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_drops_at_its_rate(broadcast):
    share = np.mean([dropped(broadcast, 0.25, seed).mean() for seed in range(8)])
    deviation = (0.25 * 0.75 / (8 * 16 * 16 * (1 if broadcast else 6))) ** 0.5
    assert abs(share - 0.25) < 4 * deviation


def test_layer_drops_where_it_is_not_deterministic():
    module = layer(attention, dropout_rate=0.5, deterministic=False)
    x = normal(B, T, FEATURES)
    assert np.any(module(x) != module(x))
    assert_close(module(x, deterministic=True), module(x, deterministic=True), atol=0)


# Decoding.


@functools.partial(nnx.jit, static_argnums=(2, 3))
def decode(module, x, is_causal, options):
    """One step per token, through the cache; and all at once."""
    options = dict(options)
    module.init_cache(x.shape)
    steps = []
    for i in range(x.shape[1]):
        place = {"query_position": i} if options else {}
        module.attention_fn = functools.partial(attention, **place, **options)
        steps.append(module(x[:, i : i + 1], decode=True, is_causal=is_causal))
    module.attention_fn = functools.partial(attention, **options)
    return jnp.concatenate(steps, axis=1), module(x, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_decoding_equals_the_whole(is_causal):
    x = normal(B, 3, FEATURES)
    assert_close(*decode(layer(), x, is_causal, ()))


def test_decoding_with_positions_equals_the_whole():
    """A modifier and a mask of positions, through a cache."""
    options = (("modifier", ALiBi()), ("and_mask", Window(1, 0)))
    assert_close(*decode(layer(), normal(B, 3, FEATURES), False, options))


def test_input_positions_are_where_queries_and_keys_stand():
    x, position = normal(B, T, N, H), jnp.arange(T) * 3 + 4
    got = attention(x, x, x, input_positions=position, modifier=ALiBi(), is_causal=True)
    options = {"query_position": position, "key_position": position}
    assert_close(got, defined(x, x, x, modifier=ALiBi(), mask=Causal(), **options))
    last = attention(x[:, -1:], x, x, input_positions=position[-1:], modifier=ALiBi())
    assert_close(last, defined(x[:, -1:], x, x, modifier=ALiBi(), query_position=16))


def test_causal_is_about_order_where_positions_start_anew():
    x, position = normal(B, 4, N, H), jnp.array([0, 1, 0, 1])
    got = attention(x, x, x, input_positions=position, is_causal=True)
    assert_close(got, nnx.dot_product_attention(x, x, x, is_causal=True))


# What flax lacks.


def test_masks_and_modifiers_of_this_library_are_taken():
    x = normal(B, T, FEATURES)
    module = layer(functools.partial(attention, modifier=SoftCap(2.0), and_mask=Causal()))
    got = module(x, mask=lambda b, n, t, s: t - s <= 1)
    heads = [getattr(module, name)(x) for name in ("query", "key", "value")]
    want = defined(*heads, mask=Window(1, 0), modifier=SoftCap(2.0))
    assert_close(got, module.out(want))


def test_a_query_that_sees_no_key_gives_zero():
    x = normal(T, N, H)
    mask = jnp.arange(T)[:, None] > jnp.zeros(T)
    output, *gradients = values_and_gradients(lambda x: attention(x, x, x, mask=mask), x)
    assert not np.any(output[0])
    assert np.all(np.isfinite(gradients[0]))


@pytest.mark.parametrize("kind", [nnx.Variable, nnx.Param])
def test_a_mask_may_be_a_variable(kind):
    x, mask = normal(T, N, H), jnp.tri(T, dtype=bool)
    want = jattn.attention(x, x, x, mask=mask)
    for attend in (attention, jattn.attention):
        assert_close(attend(x, x, x, mask=kind(mask)), want)


def test_works_under_strict_promotion():
    x = normal(T, N, H, dtype="bfloat16")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        output = attention(x, x, x, mask=jnp.ones((T, T)), is_causal=True)
    assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_rate": 0.5}, "nnx.attention: dropout at rate 0.5 needs a random key"),
        ({"precision": ("high", "highest")}, "`precision` must be the same for both"),
        ({"precision": "good"}, "`precision` must be a `jax.lax.Precision`"),
        ({"dropout_rate": "a"}, r"nnx.attention: `dropout_rate` must .* got 'a'; give a"),
        ({"dropout_rate": -0.5}, r"nnx.attention: `dropout_rate` must .* got -0.5; give a"),
        ({"input_positions": 0.5}, "nnx.attention: `input_positions` must hold integers"),
        ({"input_positions": jnp.arange(3)}, r"`input_positions` must be an integer or"),
        ({"input_positions": 1, "query_position": 1}, "must come from one place"),
        ({"modifier": ALiBi()}, "must be told where a single query stands among 5 keys"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    x = normal(T, N, H)
    with pytest.raises(ValueError, match=message):
        attention(x[:1], x, x, **options)
