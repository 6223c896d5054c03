"""Derivatives, in float64: by finite differences and by the definition's own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Dropout, definition
from jattn.implementations.dispatch import DEFAULT_ORDER
from jattn.masks import Causal
from jattn.testing import CASES, check_gradients
from tests.helpers import emulated_tpu, small_tiles
from tests.helpers.draws import normal
from tests.helpers.params import quick_and_slow

# Cases that differ only in sizes or in how a mask is written have the same derivatives.
OF_THE_DEFINITION = (
    *("value_size", "one_visible_key", "causal_with_empty_rows", "segments_with_padding"),
    *("no_keys", "bias_per_key", "infinite_bias", "alibi_with_slopes", "relative_bias"),
    *("capped_bias", "captured", "dropout", "everything"),
)
# Implementations are compared with the definition in all cases elsewhere.
OF_IMPLEMENTATIONS = ("segments_with_padding", "infinite_bias", "captured", "everything")


# The case of all options runs in every run.
QUICK = ("everything",)


by_name = {case.name: case for case in CASES}


def of_names(names):
    return quick_and_slow([by_name[name] for name in names], QUICK, group=True)


@pytest.mark.parametrize("implementation", DEFAULT_ORDER)
@pytest.mark.parametrize("case", of_names(OF_IMPLEMENTATIONS))
def test_derivatives_are_right(case, implementation):
    function = functools.partial(jattn.attention_state, implementation=implementation)
    check_gradients(function, case)


@pytest.mark.parametrize("case", of_names(OF_THE_DEFINITION))
def test_derivatives_of_the_definition_are_right(case):
    check_gradients(definition.attention_state, case)


@pytest.mark.parametrize("wrong", ["query", "key", "value"])
def test_a_derivative_wrong_by_a_thousandth_is_caught(wrong):
    @jax.custom_jvp
    def almost_identity(x):
        return x

    almost_identity.defjvp(lambda x, tangent: (x[0], tangent[0] * 1.001))

    def state(query, key, value, **options):
        inputs = {"query": query, "key": key, "value": value}
        inputs[wrong] = almost_identity(inputs[wrong])
        return definition.attention_state(**inputs, **options)

    with pytest.raises(AssertionError, match="d_"):
        check_gradients(state, by_name["plain"])


def test_every_floating_input_has_a_gradient():
    case = by_name["everything"]
    inputs = jattn.testing.random_inputs(case)
    found = jattn.testing.derivatives(case, jattn.attention_state, inputs)
    names = ("query", "key", "value", "bias", "cap", "slopes", "sink", "scale")
    for name in names:
        assert found[f"d_{name}"].shape == inputs[name].shape
        assert np.any(found[f"d_{name}"] != 0)


def test_gradient_of_bias_has_the_shape_of_the_bias():
    query = jnp.ones((2, 3, 4, 5))
    loss = lambda bias: jnp.sum(jattn.attention(query, query, query * 2, bias=bias) ** 2)
    for shape in [(), (3,), (3, 1), (4, 1, 1), (1, 1, 1, 3), (2, 4, 3, 3)]:
        assert jax.grad(loss)(jnp.zeros(shape)).shape == shape


def test_hessian_equals_the_definition_s():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key = (jnp.asarray(rng.standard_normal((3, 2, 2))) for _ in range(2))
        mask = jattn.masks.Causal(-1)  # the first query sees nothing

        def loss(function, query):
            return jnp.sum(jnp.sin(function(query, key, key, mask=mask)))

        got = jax.hessian(functools.partial(loss, jattn.attention))(query)
        want = jax.hessian(functools.partial(loss, definition.attention))(query)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
        assert np.all(np.isfinite(got))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("attend", [jattn.attention, small_tiles.attention])
def test_hidden_numbers_reach_no_gradient(attend, bad):
    """Also where a bias and a scale are differentiated, for which δ is summed up anew."""
    query, key, value = (normal(i, (1, 6, 2, 4)) for i in range(3))
    bias = normal(3, (1, 2, 6, 6))
    hidden = jnp.arange(6) == 4

    def gradients(key, value):
        def loss(query, key, value, bias, scale):
            mask = lambda b, n, t, s: (s != 4) & (t >= s)
            output = attend(query, key, value, mask=mask, bias=bias, scale=scale)
            return jnp.sum(output**2)

        inputs = query, key, value, bias, jnp.asarray(0.4)
        return jax.grad(loss, range(5))(*inputs)

    spoil = lambda x: jnp.where(hidden[None, :, None, None], bad, x)
    want, got = gradients(key, value), gradients(spoil(key), spoil(value))
    chex.assert_trees_all_close(got, want, atol=1e-6)


@pytest.mark.parametrize("head_dim", [8, 16, 32])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["plain", "causal"])
def test_large_tiles_of_small_heads_have_right_gradients_of_all_else(head_dim, mask):
    """XLA:CPU of jax 0.10 may fuse their product with a sum, wrongly: by 10 to 100 %."""
    T = 2048  # then `Causal` leaves a tile of 1024 × 1024 whole
    rng = np.random.default_rng(head_dim)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
    query, key, value, d_output = (draw(1, T, 1, head_dim) for _ in range(4))
    others = jnp.float32(1.3), draw(1, 1, T, 1), draw(T), jnp.float32(0.4)

    def loss(implementation, query, cap, bias, slope, scale):
        modifier = lambda x, b, n, t, s: cap * jnp.tanh(x / cap) + slope[s] * x
        options = {"mask": mask, "bias": bias, "modifier": modifier, "scale": scale}
        output = jattn.attention(
            query, key, value, implementation=implementation, **options
        )
        return jnp.sum(output * d_output)

    gradients = jax.jit(jax.grad(loss, range(1, 6)), static_argnums=0)
    got, want = (gradients(name, query, *others) for name in ("blockwise", "dense"))
    largest = max(np.linalg.norm(x) for x in want)  # that of the bias is 0 by cancelling
    for x, y in zip(got, want, strict=True):
        # Both are sums over up to 4 million pairs, whose terms are rounded to 1e-7.
        assert np.linalg.norm(x - y) <= 1e-4 * largest


IN_TILES = {
    "blockwise": functools.partial(jattn.attention_state, implementation="blockwise"),
    "small tiles": small_tiles.attention_state,
    "kernels": emulated_tpu.attention_state,
}
ALONE = {
    "nothing": {},
    "dropout": {"dropout": Dropout(0.5, jax.random.key(0))},
    "a sink": {"sink": np.float32([40])},
    "a scale": {"scale": jnp.float32(1)},
}


@pytest.mark.parametrize("way", IN_TILES)
@pytest.mark.parametrize("beside", ALONE)
@pytest.mark.parametrize("head_dim", [1, 8, 64])
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_key_with_all_the_weight_and_a_small_value_has_its_slope(
    way, beside, head_dim, size
):
    """Its weight rounds to 1, but less of it gives the large values of other keys room."""
    rng = np.random.default_rng(head_dim)
    query, key = np.zeros((1, 4, 1, 4)), rng.standard_normal((1, 24, 1, 4))
    query[..., 0] = 1
    key[..., 0] = np.round(2 * key[..., 0])  # the first number is the logit
    value = 1e5 * rng.standard_normal((1, 24, 1, head_dim))
    key[0, 5, 0, 0], value[0, 5] = 32, size
    arrays = [x.astype(np.float32) for x in (query, key, value)]
    d_output = rng.standard_normal((1, 4, 1, head_dim)).astype(np.float32)

    def gradients(attend, arrays, d_output):
        options = {"scale": 1.0} | ALONE[beside]
        total = lambda *arrays: jnp.sum(attend(*arrays, **options).output * d_output)
        return jax.grad(total, (0, 1, 2))(*arrays)

    dense = functools.partial(jattn.attention_state, implementation="dense")
    got, near = (gradients(x, arrays, d_output) for x in (IN_TILES[way], dense))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (*arrays, d_output)]
        want = gradients(definition.attention_state, wide[:3], wide[3])
        want = [np.asarray(x) for x in want]
    eps = float(np.finfo("float32").eps)
    for x, y, exact in zip(got, near, want, strict=True):
        error = lambda x, exact=exact: np.max(np.abs(np.asarray(x, np.float64) - exact))
        # Of a sum of up to 64 products, in each of the two terms that are subtracted.
        assert error(x) <= 1.5 * error(y) + 64 * eps * np.max(np.abs(exact))


@pytest.mark.parametrize("way", IN_TILES)
@pytest.mark.parametrize("beside", ["nothing", "a sink"])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_tokens_that_share_a_row_leave_no_slope(way, beside, copies):
    """Whatever share each one has, the output is their value; large queries show less."""
    rng = np.random.default_rng(copies)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    query, key, value = draw(1, 5, 1, 16), draw(1, 40, 1, 16), draw(1, 40, 1, 64)
    key[:, 7 : 7 + copies], value[:, 7 : 7 + copies] = 3 * key[:, :1], value[:, :1]
    query = 1e4 * (query + key[:, 7:8])
    d_output = draw(1, 5, 1, 64)

    def loss(query, key):
        output = IN_TILES[way](query, key, value, **ALONE[beside]).output
        return jnp.sum(output * d_output)

    for gradient in jax.grad(loss, (0, 1))(query, key):
        assert not np.any(gradient)
