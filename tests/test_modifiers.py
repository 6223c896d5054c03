"""Modifiers: their formulas, their order, and what they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.modifiers import (
    ALiBi,
    Bias,
    RelativeBias,
    SoftCap,
    alibi_slopes,
    distance,
    log_bucket,
)
from tests.helpers.draws import normal

T, S, N = 3, 4, 2
rng = np.random.default_rng(0)
QUERY = jnp.asarray(rng.standard_normal((T, N, 5)), jnp.float32)
KEY = jnp.asarray(rng.standard_normal((S, N, 5)), jnp.float32)
t, s = np.arange(T)[:, None], np.arange(S)[None]


def logits(modifier=None, **options):
    return np.asarray(jattn.attention_logits(QUERY, KEY, modifier=modifier, **options))


PLAIN = logits()


def test_soft_cap_is_a_scaled_tanh():
    np.testing.assert_allclose(logits(SoftCap(1.5)), 1.5 * np.tanh(PLAIN / 1.5), rtol=1e-5)


def test_soft_cap_far_above_the_logits_changes_nothing():
    np.testing.assert_allclose(logits(SoftCap(1e4)), PLAIN, rtol=1e-5)


def slopes_of_cap(ratio):
    """Gives the derivatives of a soft cap by the logit and by the cap, in float64."""
    squared = 1 / np.cosh(ratio) ** 2
    by_cap = np.tanh(ratio) - ratio * squared
    # Below this the fourth term, 2e-13 of the sum, is less than what the difference loses.
    series = 2 / 3 * ratio**3 * (1 - 4 / 5 * ratio**2 + 17 / 35 * ratio**4)
    return squared, np.where(np.abs(ratio) < 0.01, series, by_cap)


# In float32 tanh rounds to 1 above 9, and 1 − tanh² was 0 from 8 on.
@pytest.mark.parametrize("ratio", [1e-9, -1e-4, 0.02, -0.9, 1.1, 7.5, -8.5, 12.0, 40.0])
@pytest.mark.parametrize("cap", [1e-6, 50.0, 1e20])
def test_derivatives_of_a_soft_cap_keep_their_digits(ratio, cap):
    logit, cap = jnp.float32(ratio * cap), jnp.float32(cap)
    one = jnp.ones((1, 1, 1))

    def capped(logit, cap):
        options = {"modifier": SoftCap(cap), "scale": 1.0}
        return jattn.attention_logits(logit * one, one, **options)[0, 0, 0]

    got = jax.grad(capped, (0, 1))(logit, cap)
    exact = float(logit) / float(cap)
    # The ratio is rounded twice, and sech² has 2 |ratio| times the relative error of it.
    rtol = (8 + 4 * abs(exact)) * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(got, slopes_of_cap(exact), rtol)


def test_second_derivatives_of_a_soft_cap_are_those_of_tanh():
    with jax.enable_x64(True):
        ratio = np.array([-30.0, -3.0, -0.5, 0.1, 0.99, 1.01, 8.0])
        logits, cap = jnp.asarray(3 * ratio), jnp.float64(3)
        modify = lambda x, c: SoftCap(c).modify(x, 0, 0, 0, 0, c)
        got = [
            jax.vmap(jax.jacrev(jax.grad(modify, i), j), (0, None))(logits, cap)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
    bend = -2 * np.tanh(ratio) / np.cosh(ratio) ** 2 / 3
    want = bend, -ratio * bend, -ratio * bend, ratio**2 * bend
    np.testing.assert_allclose(got, want, rtol=1e-11)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_saturated_logits_have_the_gradient_of_the_definition(implementation):
    query, key, value = (normal(i, (1, 5, 1, 4)) for i in range(3))
    arrays = 3 * query, 3 * key, value  # logits of up to 20, forty times the cap

    def gradient(attention, *arrays, **options):
        total = lambda x, cap: jnp.sum(
            jnp.sin(attention(x, *arrays[1:3], modifier=SoftCap(cap), **options))
        )
        return jax.grad(total, (0, 1))(arrays[0], arrays[3])

    got = gradient(
        jattn.attention, *arrays, jnp.float32(0.5), implementation=implementation
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (*arrays, 0.5)]
        want = gradient(jattn.definition.attention, *wide)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4)


def test_alibi_takes_the_distance_times_the_slope():
    slopes = jnp.array([0.5, 0.25])
    expected = PLAIN - np.asarray(slopes)[:, None, None] * abs(t - s)
    np.testing.assert_allclose(logits(ALiBi(slopes)), expected, rtol=1e-5)


def test_alibi_slopes_are_the_paper_s():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2])


def test_alibi_slopes_are_as_precise_as_inputs_in_double_precision():
    exact = 2.0 ** np.array([-1.0, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(alibi_slopes(12), exact)
        zeros = jnp.zeros((100, 12, 1), jnp.float64)
        got = jattn.attention_logits(zeros, zeros, modifier=ALiBi())
    distances = np.abs(np.subtract.outer(np.arange(100), np.arange(100)))
    np.testing.assert_array_equal(got, -exact[:, None, None] * distances)


def test_alibi_without_slopes_takes_the_paper_s():
    np.testing.assert_array_equal(logits(ALiBi()), logits(ALiBi(alibi_slopes(N))))


def test_relative_bias_reads_the_table_at_the_bucket_of_the_offset():
    table = jnp.arange(2.0 * 5).reshape(2, 5)
    expected = PLAIN + np.asarray(table)[:, np.clip(s - t, -2, 2) + 2]
    np.testing.assert_allclose(logits(RelativeBias(table)), expected, rtol=1e-5)
    same = RelativeBias(table, bucket=distance(2))
    np.testing.assert_array_equal(logits(same), logits(RelativeBias(table)))


@pytest.mark.parametrize(
    ("offset", "index"),
    [(0, 0), (-1, 1), (-7, 7), (-8, 8), (-127, 15), (-500, 15), (1, 17), (500, 31)],
)
def test_log_bucket_is_that_of_t5(offset, index):
    assert int(log_bucket(32, 128)(jnp.int32(offset))) == index


# One distance is at the begin of a bucket exactly: log(10) / log(100) · 2 = 1.
@pytest.mark.parametrize(
    ("sizes", "far", "indices"),
    [
        ((6, 100, True), 10, [1, 2]),
        ((32, 800, True), 80, [11, 12]),
        ((8, 144, False), 24, [5, 6]),
        ((64, 50, False), 40, [46, 48]),
        ((36, 8192, False), 384, [26, 27]),
        ((32, 8192, False), 5548, [30, 31]),  # 5547 is 30.9999997
        ((32, 2**31 - 1, True), 189812532, [14, 15]),  # 8 · (2³¹ / 8)^(7/8) = 189812531.2
    ],
)
def test_a_bucket_begins_where_its_formula_says(sizes, far, indices):
    bucket = jax.jit(log_bucket(*sizes))
    assert [int(bucket(jnp.int32(-x))) for x in (far - 1, far)] == indices


@pytest.mark.parametrize("distant", [2**31, 2**40, 2**70, 10**400], ids=int.bit_length)
def test_a_distance_is_one_that_positions_can_have(distant):
    for make in (lambda: log_bucket(32, distant), lambda: log_bucket(distant, distant)):
        with pytest.raises(ValueError, match=r"log_bucket: `max_dis.* at most 2147483647"):
            make()
    with pytest.raises(ValueError, match=r"distance: `radius`.* at most 1073741823"):
        distance(distant)
    far = jnp.int32(2**31 - 1)
    assert [int(distance(2**30 - 1)(x)) for x in (-far, far)] == [0, 2**31 - 2]


def test_log_bucket_of_one_direction_has_no_place_for_later_keys():
    bucket = log_bucket(32, 128, bidirectional=False)
    assert [int(bucket(jnp.int32(x))) for x in (5, 0, -3, -500)] == [0, 0, 3, 31]


def test_bias_modifier_alone_equals_the_argument_bias():
    bias = jnp.asarray(rng.standard_normal((N, 1, S)), jnp.float32)
    np.testing.assert_array_equal(logits(Bias(bias)), logits(bias=bias))


def test_modifiers_compose_left_to_right():
    bias = jnp.full((T, S), 3.0)
    np.testing.assert_allclose(
        logits(Bias(bias) >> SoftCap(2.0)), 2 * np.tanh((PLAIN + 3) / 2), rtol=1e-5
    )
    np.testing.assert_allclose(
        logits(SoftCap(2.0) >> Bias(bias)), 2 * np.tanh(PLAIN / 2) + 3, rtol=1e-5
    )


def test_functions_compose_with_modifiers_on_either_side():
    double = lambda logit, b, n, t, s: 2 * logit
    np.testing.assert_allclose(
        logits(double >> SoftCap(2.0)), 2 * np.tanh(PLAIN), rtol=1e-5
    )
    np.testing.assert_allclose(
        logits(SoftCap(2.0) >> double), 4 * np.tanh(PLAIN / 2), rtol=1e-5
    )


def test_composition_is_associative():
    a, b, c = SoftCap(3.0), ALiBi(), lambda logit, b, n, t, s: 2 * logit + 1
    np.testing.assert_array_equal(logits((a >> b) >> c), logits(a >> (b >> c)))


def test_order_is_modifier_then_bias_then_mask():
    bias = jnp.full((T, S), 5.0)
    mask = lambda b, n, t, s: t >= s
    got = logits(SoftCap(1.0), bias=bias, mask=mask)
    expected = np.where(t >= s, np.tanh(PLAIN) + 5, -np.inf)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_modifier_acts_on_scaled_products():
    got = logits(lambda logit, b, n, t, s: logit + 1, scale=2.0)
    np.testing.assert_allclose(got, 2 * PLAIN * 5**0.5 + 1, rtol=1e-4)


def test_modifier_sees_positions_example_and_head():
    place = lambda b, n, t, s: (100 * n + 10 * t + s).astype(jnp.float32)
    modifier = lambda logit, b, n, t, s: 0 * logit + place(b, n, t, s)
    got = logits(modifier, query_position=4)
    expected = 100 * np.arange(N)[:, None, None] + 10 * (t + 4) + s
    np.testing.assert_array_equal(got, expected)


def test_a_modifier_prints_as_one_writes_it():
    written = "SoftCap(50.0) >> RelativeBias(float32[2, 33], log_bucket(33, 64, False))"
    table = jnp.zeros((2, 33))
    caps = SoftCap(50.0) >> RelativeBias(table, log_bucket(33, 64, False))
    assert repr(caps).replace(repr(np.zeros((2, 33)).tolist()), "float32[2, 33]") == written
    nested = ALiBi() >> (SoftCap(1.0) >> RelativeBias(jnp.zeros((3, 101)), distance(50)))
    written = "ALiBi() >> (SoftCap(1.0) >> RelativeBias(float32[3, 101], distance(50)))"
    assert repr(nested) == written


HALVES = {
    "soft cap": (SoftCap, np.array(50.0)),
    "relative bias": (lambda x: RelativeBias(x, distance(4)), np.zeros((2, 9))),
    "a table, widened": (
        lambda x: lambda l, b, n, t, s: l + x.astype(l.dtype)[n, (t + s) % 9],
        np.zeros((2, 9)),
    ),
    "a table, computed": (
        lambda x: lambda l, b, n, t, s: l * jnp.exp(x.astype(l.dtype))[n, t % 9],
        np.zeros((2, 9)),
    ),
}


# The gradient of such an array is a sum over the tiles, each of which would round its part.
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", HALVES)
def test_arrays_of_half_precision_have_the_gradient_of_dense(name, dtype):
    make, array = HALVES[name]
    T, S = (20, 2050) if array.ndim == 0 else (700, 40)
    query, key, value = (
        10 * normal(i, (1, n, h, 8)).astype(dtype)
        for i, (n, h) in enumerate([(T, 2), (S, 1), (S, 1)])
    )
    weight = normal(3, (1, T, 2, 8))

    def gradient(function, array, *arrays, **options):
        output = lambda x: function(*arrays, modifier=make(x), **options)
        total = lambda x: jnp.sum(output(x) * weight.astype(arrays[0].dtype))
        return np.asarray(jax.grad(total)(array)).astype(np.float64)

    given = jnp.asarray(array, dtype), query, key, value
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in given]
        want = gradient(jattn.definition.attention, *wide)
    error = lambda name: np.max(
        np.abs(gradient(jattn.attention, *given, implementation=name) - want)
    )
    unit = float(jnp.finfo(dtype).eps) * np.max(np.abs(want))
    assert error("blockwise") <= 1.5 * error("dense") + unit / 2


# What is read by pairs before it is widened: JAX would add up its gradient as narrow as it.
READ = {
    "a table": lambda x: lambda l, b, n, t, s: l + x[n, (t + s) % 9].astype(l.dtype),
    "by query": lambda x: lambda l, b, n, t, s: l * x[n, t // 100].astype(l.dtype),
    "by key": lambda x: lambda l, b, n, t, s: l + x[n, s // 100].astype(l.dtype),
    "one of two": lambda x: (
        lambda l, b, n, t, s: l + jnp.where(t > s, x[n, 0], x[n, 1]).astype(l.dtype)
    ),
    "a slope": lambda x: (
        lambda l, b, n, t, s: l - (x[n, 0] * ((t - s) % 64).astype(x.dtype)).astype(l.dtype)
    ),
    "an inner jit": lambda x: (
        lambda l, b, n, t, s: l + jax.jit(lambda i: x[n, i])((t * s) % 9).astype(l.dtype)
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("name", READ)
def test_gradients_of_narrow_arrays_are_rounded_once(name, implementation, dtype):
    T, N = 512, 2
    arrays = [normal(i, (1, T, N, 8)).astype(dtype) for i in range(4)]
    given = (normal(4, (N, 9)).astype(dtype), *arrays)

    def gradient(function, x, *arrays, **options):
        *arrays, weight = arrays
        output = lambda x: function(*arrays, modifier=READ[name](x), **options)
        # As wide as the sum of a loss should be; its cotangents are those of `dtype`.
        total = lambda x: jnp.sum((output(x) * weight).astype(float))
        return np.asarray(jax.grad(total)(x)).astype(np.float64)

    got = gradient(jattn.attention, *given, implementation=implementation)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in given]
        want = gradient(jattn.definition.attention, *wide)
    # One rounding, and what float32 leaves of sums of 10⁵ slopes that mostly cancel.
    error = np.abs(got - want) - float(jnp.finfo(dtype).eps) * np.abs(want)
    assert np.max(error) <= 1e-4 * np.max(np.abs(want))


def test_what_a_modifier_rounds_by_name_stays_rounded():
    gain = jnp.asarray([1.0, 2.0], "bfloat16")

    def modifier(logit, b, n, t, s):
        return (logit.astype(gain.dtype) * gain[n]).astype(logit.dtype)

    expected = np.asarray(jnp.asarray(PLAIN, "bfloat16").astype("float32"))
    np.testing.assert_array_equal(
        logits(modifier), expected * np.arange(1, 3)[:, None, None]
    )
