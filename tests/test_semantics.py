"""What DESIGN promises of the edges, each sentence a test, for every implementation."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Dropout
from jattn.implementations.dispatch import DEFAULT_ORDER
from jattn.masks import Causal, Explicit, Lengths
from tests.helpers import small_tiles

rng = np.random.default_rng(0)
B, T, S, N, K, H, D = 2, 5, 6, 4, 2, 8, 3
QUERY = jnp.float32(rng.standard_normal((B, T, N, H)))
KEY = jnp.float32(rng.standard_normal((B, S, K, H)))
VALUE = jnp.float32(rng.standard_normal((B, S, K, D)))

STATES = {
    name: functools.partial(jattn.attention_state, implementation=name)
    for name in DEFAULT_ORDER
} | {"blockwise_in_small_tiles": small_tiles.attention_state}


@pytest.fixture(params=STATES)
def state(request):
    return STATES[request.param]


def gradients(state, query, key, value, **options):
    """Of a sum that weighs every output and every finite logsumexp differently."""

    def loss(query, key, value):
        output, logsumexp = state(query, key, value, **options)
        seen = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(seen))

    return jax.grad(loss, (0, 1, 2))(query, key, value)


ROW = 2
EMPTY_ROW = jnp.ones((T, S), bool).at[ROW].set(False)


def test_query_that_sees_nothing_has_output_zero_and_logsumexp_minus_infinity(state):
    output, logsumexp = state(QUERY, KEY, VALUE, mask=EMPTY_ROW)
    np.testing.assert_array_equal(output[:, ROW], 0)
    np.testing.assert_array_equal(logsumexp[:, ROW], -np.inf)
    assert np.all(np.isfinite(np.delete(logsumexp, ROW, axis=1)))


def test_query_that_sees_nothing_has_no_gradient(state):
    found = gradients(state, QUERY, KEY, VALUE, mask=EMPTY_ROW)
    np.testing.assert_array_equal(found[0][:, ROW], 0)
    rest = jnp.array([t for t in range(T) if t != ROW])
    without = gradients(state, QUERY[:, rest], KEY, VALUE)
    np.testing.assert_allclose(found[1], without[1], atol=1e-6)
    np.testing.assert_allclose(found[2], without[2], atol=1e-6)


def test_no_keys_is_the_same_as_seeing_nothing(state):
    output, logsumexp = state(QUERY, KEY[:, :0], VALUE[:, :0])
    np.testing.assert_array_equal(output, np.zeros((B, T, N, D)))
    np.testing.assert_array_equal(logsumexp, np.full((B, T, N), -np.inf))
    found = gradients(state, QUERY, KEY[:, :0], VALUE[:, :0])
    np.testing.assert_array_equal(found[0], 0)


def test_sink_leaves_a_query_that_sees_nothing_at_zero(state):
    output, _ = state(QUERY, KEY, VALUE, mask=EMPTY_ROW, sink=jnp.zeros(N))
    np.testing.assert_array_equal(output[:, ROW], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["key", "value", "both"])
def test_what_is_masked_out_touches_nothing(state, bad, which):
    mask = Lengths(jnp.array([4, 2]))
    dead = jnp.arange(S)[None, :, None, None] >= jnp.array([4, 2])[:, None, None, None]
    key = jnp.where(dead, bad, KEY) if which != "value" else KEY
    value = jnp.where(dead, bad, VALUE) if which != "key" else VALUE
    clean = state(QUERY, KEY, VALUE, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, state(QUERY, key, value, mask=mask), clean)
    found = gradients(state, QUERY, key, value, mask=mask)
    expected = gradients(state, QUERY, KEY, VALUE, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nan_reaches_those_who_see_it_and_no_others(state):
    mask = Causal()
    key, value = KEY.at[:, 3].set(jnp.nan), VALUE.at[:, 4].set(jnp.nan)
    output, _ = state(QUERY, key, value, mask=mask)
    clean, _ = state(QUERY, KEY, VALUE, mask=mask)
    np.testing.assert_array_equal(output[:, :3], clean[:, :3])
    assert np.all(np.isnan(output[:, 3:]))


def test_nan_in_a_later_key_leaves_the_gradients_of_earlier_queries(state):
    loss = lambda query, key: jnp.sum(state(query, key, VALUE, mask=Causal())[0][:, :3])
    bad = jax.grad(loss)(QUERY, KEY.at[:, 3].set(jnp.nan))
    np.testing.assert_array_equal(bad[:, :3], jax.grad(loss)(QUERY, KEY)[:, :3])


def test_nan_in_a_query_leaves_the_others(state):
    mask = Explicit(EMPTY_ROW)
    bad = QUERY.at[:, ROW].set(jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal,
        state(bad, KEY, VALUE, mask=mask),
        state(QUERY, KEY, VALUE, mask=mask),
    )
    found = gradients(state, bad, KEY, VALUE, mask=mask)
    expected = gradients(state, QUERY, KEY, VALUE, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nan_without_a_mask_is_seen(state):
    output, _ = state(QUERY, KEY.at[0, 0].set(jnp.nan), VALUE)
    assert np.all(np.isnan(output[0]))
    assert np.all(np.isfinite(output[1]))


def test_bias_of_minus_infinity_masks(state):
    bias = jnp.where(EMPTY_ROW, 0.0, -jnp.inf)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        state(QUERY, KEY, VALUE, bias=bias),
        state(QUERY, KEY, VALUE, mask=EMPTY_ROW),
    )
    found = gradients(state, QUERY, KEY, VALUE, bias=bias)
    assert all(np.all(np.isfinite(x)) for x in found)


def test_sink_is_the_softmax_with_one_more_logit(state):
    sink = jnp.float32(rng.standard_normal(N))
    weights = jattn.attention_weights(QUERY, KEY, sink=sink)
    logits = jattn.attention_logits(QUERY, KEY)
    more = jnp.concatenate(
        [logits, jnp.broadcast_to(sink[:, None, None], (B, N, T, 1))], axis=-1
    )
    np.testing.assert_allclose(weights, jax.nn.softmax(more)[..., :-1], rtol=1e-5)
    output, _ = state(QUERY, KEY, VALUE, sink=sink)
    value = jnp.repeat(VALUE, N // K, axis=2)
    expected = jnp.einsum("bnts,bsnd->btnd", weights, value)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-6)


def test_sink_of_minus_infinity_is_no_sink(state):
    jax.tree.map(
        np.testing.assert_array_equal,
        state(QUERY, KEY, VALUE, sink=-jnp.inf),
        state(QUERY, KEY, VALUE),
    )


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_sink_of_any_size_is_finite(state, sink):
    output, logsumexp = state(QUERY, KEY, VALUE, sink=sink)
    assert np.all(np.isfinite(output))
    assert np.all(np.isfinite(logsumexp))


def test_logsumexp_leaves_out_the_sink(state):
    with_sink = state(QUERY, KEY, VALUE, sink=jnp.zeros(N)).logsumexp
    np.testing.assert_array_equal(with_sink, state(QUERY, KEY, VALUE).logsumexp)


def test_query_head_reads_the_key_head_of_its_group(state):
    repeat = functools.partial(jnp.repeat, repeats=N // K, axis=2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        state(QUERY, KEY, VALUE),
        state(QUERY, repeat(KEY), repeat(VALUE)),
    )


def test_batch_axis_may_be_absent_or_several(state):
    output = state(QUERY, KEY, VALUE).output
    np.testing.assert_allclose(
        state(QUERY[0], KEY[0], VALUE[0]).output, output[0], atol=1e-6
    )
    more = state(QUERY[:, None], KEY[:, None], VALUE[:, None])
    np.testing.assert_allclose(more.output, output[:, None], atol=1e-6)
    assert more.logsumexp.shape == (B, 1, T, N)


def test_bias_may_broadcast_over_some_of_several_batch_axes(state):
    query = jnp.broadcast_to(QUERY[:, None], (B, 3, T, N, H))
    key, value = (jnp.broadcast_to(x[:, None], (B, 3, *x.shape[1:])) for x in (KEY, VALUE))
    bias = jnp.float32(rng.standard_normal((B, 1, 1, T, S)))
    output = state(query, key, value, bias=bias).output
    expected = state(QUERY, KEY, VALUE, bias=bias[:, 0]).output
    np.testing.assert_allclose(output[:, 2], expected, atol=1e-6)


def test_window_as_long_as_the_sequence_is_no_window(state):
    window = jattn.masks.Window(max(T, S), max(T, S))
    np.testing.assert_allclose(
        state(QUERY, KEY, VALUE, mask=window).output,
        state(QUERY, KEY, VALUE).output,
        atol=1e-6,
    )


def test_position_as_offset_and_as_array_are_the_same(state):
    rows = 3 + jnp.arange(T)
    outputs = [
        state(QUERY, KEY, VALUE, mask=Causal(), query_position=position).output
        for position in (3, jnp.int32(3), rows, jnp.broadcast_to(rows, (B, T)))
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_output_has_the_dtype_of_the_inputs_and_logsumexp_is_float32(state, dtype, x64):
    inputs = [x.astype(dtype) for x in (QUERY, KEY, VALUE)]
    output, logsumexp = jax.jit(state)(*inputs)
    assert (output.dtype, logsumexp.dtype) == (dtype, jnp.float32)


def test_float64_is_float64_throughout(state):
    with jax.enable_x64(True):
        query, key, value = (x.astype("float64") for x in (QUERY, KEY, VALUE))
        output, logsumexp = state(query, key, value, bias=jnp.float32(0.1))
        assert (output.dtype, logsumexp.dtype) == ("float64", "float64")
        expected = jattn.definition.attention(query, key, value)
        np.testing.assert_allclose(output, expected, rtol=1e-13)


@pytest.mark.parametrize("implementation", DEFAULT_ORDER)
def test_head_size_one_in_float64_does_not_end_the_process(implementation):
    # One plain einsum of such shapes aborts XLA on CPUs, so this is a process of its own.
    code = f"""
import jax, jax.numpy as jnp, jattn
jax.config.update("jax_enable_x64", True)
query, key = jnp.ones((2, 5, 4, 1)), jnp.ones((2, 5, 2, 1))
loss = lambda *x: jattn.attention(*x, implementation="{implementation}").sum()
jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, key))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_runs_are_bitwise_equal(state):
    run = jax.jit(lambda *x: gradients(state, *x, mask=Causal()))
    first, second = run(QUERY, KEY, VALUE), run(QUERY, KEY, VALUE)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_dropout_is_equal_to_the_definition_s(state):
    dropout = Dropout(0.4, jax.random.key(5))
    output, _ = state(QUERY, KEY, VALUE, dropout=dropout)
    expected = jattn.definition.attention(QUERY, KEY, VALUE, dropout=dropout)
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("attend", [*STATES.values(), jattn.definition.attention_state])
def test_an_infinite_sink_takes_all_weight_or_none(attend):
    sink = jnp.array([jnp.inf, -jnp.inf, 0, 1])
    output = attend(QUERY, KEY, VALUE, sink=sink).output
    np.testing.assert_array_equal(output[:, :, 0], 0)
    plain = attend(QUERY, KEY, VALUE).output
    np.testing.assert_allclose(output[:, :, 1], plain[:, :, 1], atol=1e-6)


class WithAndWithoutJit(chex.TestCase):
    """Calls agree to the rounding of a compiler that joins operations."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_state_and_gradients_are_those_of_the_definition(self):
        def run(state, *arrays):
            options = {"mask": Causal(-1), "sink": jnp.float32(0.5)}
            return state(*arrays, **options), gradients(state, *arrays, **options)

        got = self.variant(functools.partial(run, jattn.attention_state))
        want = functools.partial(run, jattn.definition.attention_state)
        arrays = QUERY, KEY, VALUE
        chex.assert_trees_all_close(got(*arrays), want(*arrays), atol=2e-6)
