"""`jattn.adapters.linen` equals flax's own attention where that is right."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import definition
from jattn.masks import Causal, Window
from jattn.modifiers import ALiBi, SoftCap

nn = pytest.importorskip("flax.linen")
serialization = pytest.importorskip("flax.serialization")
adapter = pytest.importorskip("jattn.adapters.linen")

B, T, S, N, H = 2, 4, 6, 2, 3
FEATURES = N * H
# What compiles fastest; `OPTIONS` and `LAYERS` have a case each of the default.
attention = functools.partial(adapter.attention, implementation="dense")


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that flax needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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
    cotangent = jnp.sin(jnp.arange(output.size, dtype=output.dtype))
    return output, pullback(cotangent.reshape(output.shape))


# The batch axes, and what is given besides query, key and value.
OPTIONS = {
    "two_batch_axes": ((2, 1), {"mask": booleans(2, 1, 1, 1, S)}),
    "no_batch_axis": ((), {"mask": booleans(N, T, S).astype(jnp.float32)}),
    "bias_and_mask": ((B,), {"bias": normal(1, N, T, S), "mask": booleans(B, 1, T, S)}),
    "default": ((B,), {"dropout_rate": 0.5, "deterministic": True}),
}


@pytest.mark.parametrize(("batch", "options"), OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_equal_those_of_flax(batch, options):
    shapes = (*batch, T, N, H), (*batch, S, N, H), (*batch, S, N, H)
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours = attention if "mask" in options else adapter.attention
    both = (functools.partial(f, **options) for f in (ours, nn.dot_product_attention))
    got, want = (values_and_gradients(f, *arrays) for f in both)
    assert_close(got, want)


def test_takes_what_flax_takes_in_its_order():
    theirs = inspect.signature(nn.dot_product_attention).parameters
    ours = inspect.signature(adapter.attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def layer(attention_fn=None, **options):
    options |= {} if attention_fn is None else {"attention_fn": attention_fn}
    return nn.MultiHeadDotProductAttention(N, **options)


LAYERS = {
    "mask_of_ones_and_zeros": ({}, {"mask": booleans(B, 1, T, T).astype(jnp.float32)}),
    "default": ({"normalize_qk": True, "force_fp32_for_softmax": True}, {}),
}


@pytest.mark.parametrize(("options", "given"), LAYERS.values(), ids=LAYERS)
def test_layer_keeps_parameters_outputs_and_gradients(options, given):
    x = normal(B, T, FEATURES)

    def run(attention_fn):
        module = layer(attention_fn, **options)
        parameters = jax.jit(module.init)(jax.random.key(0), x)
        call = lambda parameters, x: module.apply(parameters, x, **given)
        return parameters, *values_and_gradients(call, parameters, x)

    assert_close(run(attention if given else adapter.attention), run(None))


def test_half_precision_is_no_less_exact_than_in_flax():
    arrays = [normal(B, T, N, H, dtype="bfloat16", seed=i) for i in range(3)]
    exact = nn.dot_product_attention(*(x.astype(jnp.float32) for x in arrays))
    got, want = (f(*arrays) for f in (attention, nn.dot_product_attention))
    assert got.dtype == want.dtype
    error = lambda x: np.max(np.abs(np.float32(x) - np.float32(exact)))
    assert error(got) <= error(want)


def test_layer_hands_over_dtype_and_precision():
    x = normal(B, T, FEATURES)
    module = layer(attention, dtype=jnp.bfloat16, precision="highest")
    parameters = jax.jit(module.init)(jax.random.key(0), x)
    lowered = jax.jit(module.apply).lower(parameters, x)
    assert lowered.out_info.dtype == jnp.bfloat16
    program = lowered.as_text()
    asked = program.count("precision = [HIGHEST, HIGHEST]")
    assert asked == program.count("stablehlo.dot_general") == 6  # four are projections


def test_weights_are_sown():
    x, mask = normal(B, T, FEATURES), booleans(B, 1, T, T)
    parameters = jax.jit(layer().init)(jax.random.key(0), x)
    given = {"mask": mask, "sow_weights": True, "mutable": ["intermediates"]}
    sown = [layer(f).apply(parameters, x, **given) for f in (attention, None)]
    assert_close(*sown)


@pytest.mark.parametrize("wide", [False, True])
def test_sown_weights_have_the_dtype_of_flax(wide):
    x, dtypes = (
        normal(B, T, FEATURES),
        {"dtype": "bfloat16", "force_fp32_for_softmax": wide},
    )
    parameters = jax.jit(layer(**dtypes).init)(jax.random.key(0), x)
    given = {"sow_weights": True, "mutable": ["intermediates"]}
    got, want = (
        layer(f, **dtypes).apply(parameters, x, **given)[1] for f in (attention, None)
    )
    kinds = [jax.tree.map(lambda x: x.dtype.name, sown) for sown in (got, want)]
    assert kinds[0] == kinds[1]
    assert jax.tree.leaves(kinds[0]) == ["float32" if wide else "bfloat16"]
    assert_close(got, want, atol=0.01)  # the logits in flax are in bfloat16


def test_a_cache_is_saved_and_read_by_flax():
    module = adapter.MultiHeadDotProductAttention(N, decode=True)
    tokens = normal(B, T, FEATURES)
    made = module.init(jax.random.key(0), tokens)
    _, filled = module.apply(made, tokens[:, :2], mutable="cache")
    filled = made | filled
    read = serialization.from_bytes(made, serialization.to_bytes(filled))
    assert int(read["cache"]["kv"].length) == 2
    step = lambda variables: module.apply(variables, tokens[:, 2:], mutable="cache")
    assert_close(step(read), step(filled), rtol=0, atol=0)


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
    x = normal(B, T, FEATURES)
    module = layer(attention, dropout_rate=0.5)
    parameters = jax.jit(layer().init)(jax.random.key(0), x)
    run = jax.jit(module.apply, static_argnames="deterministic")
    drop = lambda seed: run(
        parameters, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert_close(drop(0), drop(0), rtol=0, atol=0)
    assert np.any(drop(0) != drop(1))
    assert_close(run(parameters, x, deterministic=True), layer().apply(parameters, x))


# Decoding.


def decode(options, x):
    """All at once, and one step per token through the cache."""
    plain = layer(functools.partial(attention, **options))
    parameters = plain.init(jax.random.key(0), x)
    cache = layer(attention, decode=True).init(jax.random.key(0), x)["cache"]
    steps = []
    for i in range(x.shape[1]):
        place = {"query_position": i} if options else {}
        module = layer(functools.partial(attention, **place, **options), decode=True)
        variables = {**parameters, "cache": cache}
        step, cache = module.apply(variables, x[:, i : i + 1], mutable=["cache"])
        cache = cache["cache"]
        steps.append(step)
    mask = nn.make_causal_mask(x[..., 0])
    return jnp.concatenate(steps, axis=1), plain.apply(parameters, x, mask=mask)


@pytest.mark.parametrize("options", [{}, {"modifier": ALiBi(), "and_mask": Window(1, 0)}])
def test_decoding_equals_the_whole(options):
    run = jax.jit(functools.partial(decode, options))
    assert_close(*run(normal(B, 3, FEATURES)))


# What flax lacks.


def test_masks_modifiers_and_grouped_heads_are_taken():
    arrays = [normal(B, T, n, H, seed=n) for n in (4, 2, 2)]
    options = {"modifier": SoftCap(2.0), "and_mask": Causal()}
    got = attention(*arrays, mask=lambda b, n, t, s: t - s <= 1, **options)
    want = jax.jit(definition.attention)(*arrays, mask=Window(1, 0), modifier=SoftCap(2.0))
    assert_close(got, want)


def test_a_query_that_sees_no_key_gives_zero():
    x = normal(T, N, H)
    mask = jnp.arange(T)[:, None] > jnp.zeros(T)
    output, *gradients = values_and_gradients(lambda x: attention(x, x, x, mask=mask), x)
    assert not np.any(output[0])
    assert np.all(np.isfinite(gradients[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_rate": 0.5}, "linen.attention: dropout at rate 0.5 needs a random key"),
        ({"einsum_dot_general": jax.lax.dot_general}, "`einsum_dot_general` must be None"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "`qk_attn_weights_einsum` must be None"),
        ({"modifier": ALiBi()}, "must be told where a single query stands among 4 keys"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    x = normal(T, N, H)
    with pytest.raises(ValueError, match=message):
        attention(x[:1], x, x, **options)
