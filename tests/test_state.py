"""The monoid of partial answers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import EMPTY, State, merge
from jattn.testing import CASES
from tests.helpers.draws import normal

rng = np.random.default_rng(0)


def random_state(empty_rows=0):
    output, logsumexp = rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((2, 5, 3))
    output[:, :empty_rows], logsumexp[:, :empty_rows] = 0, -np.inf
    return State(jnp.float32(output), jnp.float32(logsumexp * 3))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


A, B, C = random_state(), random_state(empty_rows=2), random_state(empty_rows=1)


def test_merge_is_commutative_exactly():
    assert_equal(merge(A, B), merge(B, A))


def test_merge_is_associative():
    assert_close(merge(merge(A, B), C), merge(A, merge(B, C)))


def test_merge_is_commutative_exactly_where_the_sums_are_equal():
    b = State(B.output, A.logsumexp)
    assert_equal(merge(A, b), merge(b, A))


def test_merge_of_many_is_merging_in_turn():
    assert_equal(merge(A, B, C), merge(merge(A, B), C))


@pytest.mark.parametrize("state", [A, B], ids=["seen", "with_empty_rows"])
def test_empty_is_the_unit_exactly(state):
    assert_equal(merge(EMPTY, state), state)
    assert_equal(merge(state, EMPTY), state)


def test_merge_of_one_state_is_itself():
    assert merge(A) is A


def test_merge_of_nothings_is_nothing():
    nothing = State(jnp.zeros((2, 1, 3)), jnp.full((2, 1), -jnp.inf))
    assert_equal(merge(nothing, nothing), nothing)
    assert_equal(merge(EMPTY, EMPTY), EMPTY)


def test_merge_does_not_overflow():
    high = State(jnp.ones((1, 1, 1)), jnp.full((1, 1), 1e4))
    low = State(jnp.zeros((1, 1, 1)), jnp.full((1, 1), -1e4))
    assert_equal(merge(high, low), high)


def test_merge_keeps_the_output_dtype_and_a_wide_logsumexp():
    half = State(A.output.astype(jnp.bfloat16), A.logsumexp)
    merged = merge(half, half, EMPTY)
    assert (merged.output.dtype, merged.logsumexp.dtype) == (jnp.bfloat16, jnp.float32)


def test_merge_says_nan_where_a_part_is_nan():
    bad = State(A.output * jnp.nan, A.logsumexp)
    assert np.all(np.isnan(merge(A, bad).output))


def test_gradient_of_merge_is_finite_with_empty_rows():
    total = lambda a, b: jnp.sum(jnp.sin(merge(a, b).output))
    gradients = jax.grad(total, (0, 1))(B, C)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))


def test_merge_differentiates_to_second_order():
    with jax.enable_x64(True):
        a, b = jax.tree.map(lambda x: jnp.float64(x), (A, C))
        b = b._replace(logsumexp=jnp.where(b.logsumexp == -jnp.inf, 0.0, b.logsumexp))
        total = lambda a, b: jnp.sum(jnp.sin(merge(a, b).output)) + merge(a, b)[1].sum()
        jax.test_util.check_grads(total, (a, b), 2, ("rev",), atol=1e-6, rtol=1e-6)


# From 17 on the low share is less than a rounding of 1, which the high share then is.
@pytest.mark.parametrize("gap", [0.0, 3.0, 15.0, 20.0, 40.0])
@pytest.mark.parametrize("order", [1, -1])
def test_what_one_part_gains_the_other_one_loses(gap, order):
    one = jnp.ones((1, 1, 1))

    def merged(high, low):
        states = State(3 * one, high[None, None]), State(one, low[None, None])
        state = merge(*states[::order])
        return state.output[0, 0, 0], state.logsumexp[0, 0]

    ends = jnp.float32(gap), jnp.float32(0)
    slopes, shares = jax.jacrev(merged, (0, 1))(*ends)
    share = 1 / (1 + np.exp(gap))
    slope = 2 * share * (1 - share)
    np.testing.assert_allclose(slopes, (slope, -slope), rtol=1e-6)
    np.testing.assert_allclose(shares, (1 - share, share), rtol=1e-6)
    bend = jax.grad(lambda low: jax.grad(lambda x: merged(ends[0], x)[0])(low))(ends[1])
    np.testing.assert_allclose(bend, -slope * (1 - 2 * share), rtol=1e-6, atol=1e-7)


def test_a_small_logsumexp_keeps_its_digits():
    zero = jnp.zeros((1, 1, 1))
    low = State(zero, jnp.full((1, 1), -18.0))
    merged = merge(State(zero, jnp.zeros((1, 1))), low)
    np.testing.assert_allclose(merged.logsumexp[0, 0], np.log1p(np.exp(-18.0)), rtol=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
@pytest.mark.parametrize("name", ["plain", "causal", "documents", "large_logits"])
def test_merging_parts_of_the_keys_equals_the_whole(name, cut):
    case = next(case for case in CASES if case.name == name)
    inputs = jattn.testing.random_inputs(case)
    whole = case.call(jattn.attention_state, inputs)
    parts = []
    for part, start in ((slice(0, cut), 0), (slice(cut, None), cut)):
        cut_inputs = inputs | {name: inputs[name][:, part] for name in ("key", "value")}
        options = case.options(inputs) | {"key_position": start}
        parts.append(
            jattn.attention_state(
                *(cut_inputs[x] for x in ("query", "key", "value")), **options
            )
        )
    assert_close(merge(*parts), whole)


def test_sink_is_a_state_of_output_zero():
    query = jnp.float32(rng.standard_normal((2, 5, 3, 4)))
    sink = jnp.float32(rng.standard_normal(3))
    state = jattn.attention_state(query, query, query)
    as_state = State(jnp.zeros_like(query), jnp.broadcast_to(sink, (2, 5, 3)))
    with_sink = jattn.attention(query, query, query, sink=sink)
    np.testing.assert_allclose(merge(state, as_state).output, with_sink, atol=1e-6)


def test_merge_refuses_states_of_other_queries():
    other = State(A.output[:, :2], A.logsumexp[:, :2])
    with pytest.raises(ValueError, match=r"merge: states must have outputs …TND"):
        merge(A, other)


MANY = [jattn.State(normal(i, (2, 3, 4)), 20 * normal(100 + i, (2, 3))) for i in range(12)]


def test_many_states_merge_in_a_loop():
    """Counts one `exp`: as one long expression the gradient of 40 compiled for 22 s."""
    jaxpr = str(jax.make_jaxpr(lambda parts: jattn.merge(*parts))(MANY))
    assert jaxpr.count("= exp ") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_states_merge_as_two_by_two(dtype):
    parts = [x._replace(output=x.output.astype(dtype)) for x in MANY]
    parts[3] = jattn.State(0 * parts[3].output, -jnp.inf * jnp.ones((2, 3)))
    more = jattn.EMPTY, jattn.State(0.0, jnp.ones(3))

    def loss(merge, parts):
        output, logsumexp = merge(*parts, *more)
        return jnp.sum(output.astype("float32") ** 2) + jnp.sum(logsumexp)

    by_two = lambda *parts: functools.reduce(jattn.merge, parts)
    chex.assert_trees_all_equal(jattn.merge(*parts, *more), by_two(*parts, *more))
    got, want = (
        jax.grad(functools.partial(loss, merge))(parts) for merge in (jattn.merge, by_two)
    )
    chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-2)


def test_many_states_can_be_transposed_in_their_outputs():
    outputs, sums = zip(*MANY, strict=True)
    merge = lambda outputs: jattn.merge(*map(jattn.State, outputs, sums)).output
    got = jax.linear_transpose(merge, outputs)(outputs[0])
    want = jax.vjp(merge, outputs)[1](outputs[0])
    chex.assert_trees_all_close(got, want, atol=1e-6)
