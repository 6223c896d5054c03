"""`jattn.adapters.haiku` equals haiku's own module, and takes its parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.masks import Causal
from jattn.modifiers import ALiBi

hk = pytest.importorskip("haiku")
adapter = pytest.importorskip("jattn.adapters.haiku")

B, T, S, N, H = 2, 4, 6, 4, 2
FEATURES = N * H


@pytest.fixture(autouse=True)
def usual(strict):
    """The promotion that haiku needs."""
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
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerances))


def transform(cls, given, **options):
    options = {"w_init": hk.initializers.VarianceScaling(1.0)} | options
    run = lambda *arrays: cls(N, H, **options)(*arrays, **given)
    return hk.without_apply_rng(hk.transform(run))


# The batch axes, how a module is made, and what it is called with.
OPTIONS = {
    "plain": ((B,), {}, {}),
    "sizes": (
        (),
        {"value_size": 3, "model_size": 5, "name": "other"},
        {"mask": booleans(1, T, S)},
    ),
    "two_batch_axes": (
        (2, 1),
        {"with_bias": False},
        {"mask": booleans(2, 1, N, T, S).astype(jnp.float32)},
    ),
}


@pytest.mark.parametrize(("batch", "made", "given"), OPTIONS.values(), ids=OPTIONS)
def test_parameters_output_and_gradients_equal_those_of_haiku(batch, made, given):
    arrays = [normal(*batch, n, FEATURES, seed=i) for i, n in enumerate((T, S, S))]

    def run(cls):
        module = transform(cls, given, **made)
        parameters = module.init(jax.random.key(0), *arrays)
        loss = lambda *xs: jnp.sum(jnp.sin(module.apply(*xs)))
        gradients = jax.grad(loss, argnums=range(4))(parameters, *arrays)
        return parameters, module.apply(parameters, *arrays), gradients

    ours, theirs = adapter.MultiHeadAttention, hk.MultiHeadAttention
    assert_close(jax.jit(lambda: run(ours))(), jax.jit(lambda: run(theirs))())


def test_grouped_heads_masks_modifiers_and_dropout_are_taken():
    dropout = jattn.Dropout(0.5, jax.random.key(1))
    given = {"mask": Causal(), "modifier": ALiBi(), "dropout": dropout}
    module = transform(adapter.MultiHeadAttention, given, num_kv_heads=2)
    x = normal(B, T, FEATURES)
    parameters = module.init(jax.random.key(0), x, x, x)
    names = {name.rpartition("/")[2]: p for name, p in parameters.items()}
    assert names["key"]["w"].shape == (FEATURES, 2 * H)
    project = lambda name, x: x @ names[name]["w"] + names[name]["b"]
    heads = [project(n, x).reshape(B, T, -1, H) for n in ("query", "key", "value")]
    want = jax.jit(functools.partial(definition.attention, **given))(*heads)
    want = project("linear", want.reshape(B, T, -1))
    assert_close(module.apply(parameters, x, x, x), want)


def test_a_query_that_sees_no_key_gives_zero():
    given = {"mask": jnp.arange(T)[:, None] > jnp.zeros(T)}
    module = transform(adapter.MultiHeadAttention, given, with_bias=False)
    x = normal(T, FEATURES)
    parameters = module.init(jax.random.key(0), x, x, x)
    assert not np.any(module.apply(parameters, x, x, x)[0])


@pytest.mark.parametrize("batch", [(), (1,), (2, 1)])
def test_keys_without_the_batch_of_the_queries_serve_all(batch):
    arrays = normal(2, 3, T, FEATURES), *(normal(*batch, S, FEATURES) for _ in range(2))
    parameters = transform(hk.MultiHeadAttention, {}).init(jax.random.key(0), *arrays)
    got, want = (
        transform(cls, {"mask": booleans(2, 1, 1, T, S)}).apply(parameters, *arrays)
        for cls in (adapter.MultiHeadAttention, hk.MultiHeadAttention)
    )
    assert_close(got, want)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_nothing_to_attend_from_or_to_has_a_shape(B, T, S):
    module = transform(adapter.MultiHeadAttention, {})
    x, y = jnp.ones((B, T, FEATURES)), jnp.ones((B, S, FEATURES))
    parameters = module.init(jax.random.key(0), x, y, y)
    assert_close(module.apply(parameters, x, y, y), jnp.zeros((B, T, FEATURES)))


def test_what_cannot_be_honoured_is_refused():
    x = normal(T, FEATURES)
    for bad in (-1, "a", 1.5):
        module = transform(adapter.MultiHeadAttention, {}, num_kv_heads=bad)
        with pytest.raises(ValueError, match=f"`num_kv_heads` must be ≥ 1, got {bad!r}; "):
            module.init(jax.random.key(0), x, x, x)
    module = transform(adapter.MultiHeadAttention, {}, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"N=4 .* must be a multiple of num_kv_heads K=3"):
        module.init(jax.random.key(0), x, x, x)
    module = transform(adapter.MultiHeadAttention, {"mask": booleans(T, 3)})
    with pytest.raises(ValueError, match="must broadcast to NTS"):
        module.init(jax.random.key(0), x, x, x)


def test_layers_in_a_stack_decode_where_init_got_no_tokens():
    made = {"w_init": hk.initializers.VarianceScaling(1.0)}
    stacked = lambda layer, x: hk.experimental.layer_stack(2)(layer)(x)
    module = lambda: adapter.MultiHeadAttention(N, H, **made)
    decode = hk.transform_with_state(
        lambda x: stacked(lambda x: x + module().extend(x, capacity=T), x)
    )
    whole = hk.transform(lambda x: stacked(lambda x: x + module()(x, x, x, Causal()), x))
    x, outputs = normal(B, T, FEATURES), []
    params, state = decode.init(jax.random.key(0), x[:, :0])
    for piece in (x[:, :3], x[:, 3:]):
        output, state = decode.apply(params, state, None, piece)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole.apply(params, None, x))
