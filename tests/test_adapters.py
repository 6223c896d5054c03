"""`jattn.adapters.jax_nn` equals `jax.nn` where that is right, and is right elsewhere."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jattn import definition
from jattn.adapters.jax_nn import dot_product_attention
from jattn.implementations import dispatch

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8


theirs = jax.nn.dot_product_attention
# Compiled as one, which takes less time here than operation by operation.
quick_theirs = jax.jit(theirs, static_argnames=("is_causal", "return_residual"))


def inputs(dtype="float32", *, kv_heads=K, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def booleans(*shape):
    """A mask whose first key counts for everyone."""
    mask = np.random.default_rng(2).random(shape) < 0.5
    mask[..., :1] = True
    return jnp.asarray(mask)


def lengths(*numbers):
    return jnp.asarray(numbers, jnp.int32)


# Every query that counts sees some key: elsewhere jax.nn is not to be equalled.
OPTIONS = {
    "plain": {},
    "bias": {"bias": normal(B, N, T, S)},
    "bias_per_key": {"bias": normal(B, 1, 1, S)},
    "bias_without_batch": {"bias": normal(N, T, S)},
    "bias_of_two_axes": {"bias": normal(T, S)},
    "whole_bias": {"bias": jnp.arange(S, dtype=jnp.int32)[None, None, None]},
    "mask": {"mask": booleans(B, N, T, S)},
    "mask_of_padding": {"mask": booleans(B, 1, 1, S)},
    "mask_without_batch": {"mask": booleans(1, T, S)},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "window_of_two_sides": {"local_window_size": (3, 0)},
    "key_lengths": {"key_value_seq_lengths": lengths(4, 9)},
    "query_lengths": {"query_seq_lengths": lengths(0, 5)},
    "everything": {
        "bias": normal(1, N, 1, S),
        "mask": booleans(B, 1, T, S),
        "scale": 0.5,
        "is_causal": True,
        "query_seq_lengths": lengths(6, 5),
        "key_value_seq_lengths": lengths(8, 3),
        "local_window_size": (8, 1),
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def values_and_gradients(function, arrays, options, cotangent):
    """Output and residual, and the output's gradients: query, key, value, floating bias."""
    if "bias" in options and jnp.issubdtype(options["bias"].dtype, jnp.floating):
        options = dict(options)
        arrays = *arrays, options.pop("bias")
    static = tuple((k, x) for k, x in options.items() if not isinstance(x, jax.Array))
    # jax.nn adds integers, and works in half precision, only under standard promotion.
    with jax.numpy_dtype_promotion("standard" if function is theirs else "strict"):
        return _values_and_gradients(function, static, arrays, options, cotangent)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values_and_gradients(function, static, arrays, options, cotangent):
    attend = lambda *xs: function(*xs, **(options | dict(static)), return_residual=True)
    output, pullback, residual = jax.vjp(attend, *arrays, has_aux=True)
    return output, residual, *pullback(cotangent.astype(output.dtype))


def assert_close(got, want, **tolerances):
    """Equal to rounding: a few units in the last place of numbers of size 1."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerances))


def test_signature_is_that_of_jax_nn():
    plain = lambda function: [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]
    assert plain(dot_product_attention) == plain(jax.nn.dot_product_attention)


@each_option
def test_output_residual_and_gradients_equal_jax_nn(options):
    arrays, cotangent = inputs(), normal(B, T, N, H)
    got = values_and_gradients(dot_product_attention, arrays, options, cotangent)
    want = values_and_gradients(theirs, arrays, options, cotangent)
    seen = _seen(options)
    assert got[1].shape == (B, T, N)
    assert_close(jnp.where(seen, got[1], 0), jnp.where(seen, want[1], 0))
    assert_close((got[0], *got[2:]), (want[0], *want[2:]))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_jax_nn(kv_heads):
    arrays = inputs(kv_heads=kv_heads)
    options = {"is_causal": True}
    assert_close(
        dot_product_attention(*arrays, **options), quick_theirs(*arrays, **options)
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_inputs_without_batch_equal_jax_nn(axes):
    """Down to one axis, as `jax.nn` does it: T, and then N, are 1."""
    query, key, value = (x[0] for x in inputs(kv_heads=N))
    query = query[(0,) * (3 - axes)]
    key, value = (x if axes > 1 else x[:, :1] for x in (key, value))
    got = dot_product_attention(query, key, value, return_residual=True)
    want = quick_theirs(query, key, value, return_residual=True)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    assert_close(got, want)


def test_every_option_without_batch_equals_jax_nn():
    arrays, options = [x[1] for x in inputs()], dict(OPTIONS["everything"])
    for name in ("mask", "bias"):
        options[name] = options[name][-1]  # NTS
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        options[name] = options[name][1:]
    cotangent = normal(T, N, H)
    got = values_and_gradients(dot_product_attention, arrays, options, cotangent)
    want = values_and_gradients(theirs, arrays, options, cotangent)
    seen = got[1] > -jnp.inf
    assert 0 < jnp.sum(seen) < T * N
    assert_close((got[0], *got[2:]), (want[0], *want[2:]))
    assert_close(jnp.where(seen, got[1], 0), jnp.where(seen, want[1], 0))


def test_numpy_arrays_are_taken():
    arrays = [np.asarray(x) for x in inputs()]
    got = dot_product_attention(*arrays, mask=np.asarray(booleans(B, 1, T, S)))
    assert_close(got, quick_theirs(*arrays, mask=booleans(B, 1, T, S)))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_bfloat16_is_no_less_exact_than_jax_nn(name):
    arrays, cotangent = inputs("bfloat16"), normal(B, T, N, H).astype(jnp.bfloat16)
    wide, options = [x.astype(jnp.float32) for x in arrays], OPTIONS[name]
    exact = values_and_gradients(dot_product_attention, wide, options, cotangent)
    got = values_and_gradients(dot_product_attention, arrays, options, cotangent)
    want = values_and_gradients(theirs, arrays, options, cotangent)
    assert [x.dtype for x in (got[0], *got[2:])] == [x.dtype for x in (want[0], *want[2:])]
    seen = _seen(options)  # where no key is seen, only ours is right
    counts = [seen if x.ndim == 3 else np.ones(x.shape, bool) for x in exact]
    errors, rivals = (list(map(distance, xs, exact, counts)) for xs in (got, want))
    # Twice the rival's, or half a unit in the last place: what rounding the result costs.
    largest = [np.max(np.abs(np.float32(x)[c])) for x, c in zip(exact, counts, strict=True)]
    roundings = [2**-9 * x for x in largest]
    for error, rival, rounding in zip(errors, rivals, roundings, strict=True):
        assert error <= 2 * max(rival, rounding)


def distance(x, exact, counts) -> float:
    """The largest difference among the elements that count."""
    difference = np.float32(x)[counts] - np.float32(exact)[counts]
    return np.max(np.abs(difference), initial=0)


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "everything"])
def test_float32_is_as_exact_as_jax_nn(name):
    arrays, cotangent, options = inputs(), normal(B, T, N, H), OPTIONS[name]
    with jax.enable_x64(True):
        wide = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact = values_and_gradients(
            dot_product_attention,
            tuple(map(wide, arrays)),
            {k: wide(x) if isinstance(x, jax.Array) else x for k, x in options.items()},
            wide(cotangent),
        )
    got = values_and_gradients(dot_product_attention, arrays, options, cotangent)
    want = values_and_gradients(theirs, arrays, options, cotangent)
    seen = _seen(options)  # where no key is seen, only ours is right
    for x, y, truth in zip(got, want, exact, strict=True):
        counts = seen if x.ndim == 3 else np.ones(x.shape, bool)
        rounding = float(jnp.finfo(x.dtype).eps) / 4 * np.max(np.abs(truth[counts]))
        error, rival = (mean_distance(z, truth, counts) for z in (x, y))
        # Three times: gradients start from a logsumexp rounded by as much as a weight.
        assert error <= 3 * max(rival, rounding)


def mean_distance(x, exact, counts) -> float:
    """Computes the root of the mean square; the largest of so few is a matter of luck."""
    difference = np.asarray(x, float)[counts] - np.asarray(exact)[counts]
    return np.sqrt(np.mean(difference**2))


def _seen(options) -> np.ndarray:
    """Says which queries see a key, BTN, by what `jax.nn` documents."""
    t, s = np.arange(T)[:, None], np.arange(S)
    seen = np.broadcast_to(options.get("mask", np.bool_(True)), (B, N, T, S)).copy()
    if options.get("is_causal"):
        seen &= t >= s
    if "local_window_size" in options:
        left, right = np.broadcast_to(options["local_window_size"], 2)
        seen &= (t - s <= left) & (s - t <= right)
    for name, i in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        if name in options:
            seen &= i < np.asarray(options[name])[:, None, None, None]
    return np.swapaxes(seen.any(axis=-1), 1, 2)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    is_causal=st.booleans(),
    visible=st.floats(0, 1),
    scale=st.floats(-2, 2, width=32),
    window=st.tuples(st.integers(0, S), st.integers(0, S)),
    query_lengths=st.tuples(st.integers(0, T), st.integers(0, T)),
    key_lengths=st.tuples(st.integers(0, S), st.integers(0, S)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_options_equal_jax_nn_where_a_key_is_seen_and_give_zero_elsewhere(
    is_causal, visible, scale, window, query_lengths, key_lengths, seed
):
    rng = np.random.default_rng(seed)
    options = {
        "is_causal": is_causal,
        "mask": jnp.asarray(rng.random((B, N, T, S)) <= visible),
        "bias": jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32),
        "scale": jnp.float32(scale),
        "local_window_size": jnp.asarray(window, jnp.int32),
        "query_seq_lengths": lengths(*query_lengths),
        "key_value_seq_lengths": lengths(*key_lengths),
    }
    seen = _seen(options)
    arrays = inputs(seed=seed)
    cotangent = jnp.where(seen[..., None], normal(B, T, N, H), 0)
    got = values_and_gradients(dot_product_attention, arrays, options, cotangent)
    want = values_and_gradients(theirs, arrays, options, cotangent)
    output = jnp.where(seen[..., None], want[0], 0)
    residual = jnp.where(seen, want[1], -jnp.inf)
    assert_close(got, (output, residual, *want[2:]), atol=1e-5)


# Known faults of jax.nn 0.10 and 0.12, as cases that pass here.


def test_softmax_of_float64_is_in_float64():
    with jax.enable_x64(True):
        arrays = inputs("float64")
        error = dot_product_attention(*arrays) - definition.attention(*arrays)
        assert np.max(np.abs(error)) < 1e-14


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_residual_of_half_precision_is_float32_and_has_a_gradient(dtype):
    arrays = inputs(dtype)
    residual = lambda *xs: dot_product_attention(*xs, return_residual=True)[1]
    exact = lambda query, key, value: (
        definition.attention_state(query, key, value).logsumexp
    )
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in arrays]
        want, pullback = jax.vjp(exact, *wide)
        gradients = pullback(jnp.ones_like(want))
    got, pullback = jax.vjp(residual, *arrays)
    assert got.dtype == jnp.float32
    assert_close(got, want)
    size = float(jnp.finfo(dtype).eps)
    assert_close(pullback(jnp.ones_like(got)), gradients, rtol=size, atol=size)


def test_a_query_that_sees_no_key_has_output_and_gradients_zero():
    options = {"key_value_seq_lengths": lengths(0, S), "return_residual": True}
    query, key, value = inputs()
    output, residual = dot_product_attention(query, key, value, **options)
    assert not np.any(output[0])
    assert np.all(residual[0] == -np.inf)
    options["return_residual"] = False
    loss = lambda *xs: jnp.sum(jnp.sin(dot_product_attention(*xs, **options)))
    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    assert all(np.all(np.isfinite(x)) and not np.any(x[0]) for x in gradients)


def test_a_bias_that_hides_every_key_gives_zero():
    output = dot_product_attention(*inputs(), bias=jnp.full((1, 1, T, S), -jnp.inf))
    assert not np.any(output)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_masked_out_does_not_leak(bad):
    query, key, value = inputs()
    options = {"key_value_seq_lengths": lengths(4, 5)}
    spoilt = [x.at[0, 4:].set(bad).at[1, 5:].set(bad) for x in (key, value)]
    cotangent = normal(B, T, N, H)
    values = lambda *xs: values_and_gradients(dot_product_attention, xs, options, cotangent)
    assert_close(values(query, *spoilt), values(query, key, value), rtol=0, atol=0)


def test_window_exports_with_symbolic_shapes():
    b, t, s = export.symbolic_shape("b, t, s")
    shapes = (b, t, N, H), (b, s, K, H), (b, s, K, H)
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    attend = jax.jit(
        lambda *xs: dot_product_attention(*xs, local_window_size=(3, 1), is_causal=True)
    )
    exported = export.export(attend)(*structs)
    assert_close(exported.call(*inputs()), attend(*inputs()))


def test_head_size_of_values_may_differ():
    query, key, value = inputs()
    output = dot_product_attention(query, key, value[..., :3])
    assert_close(output, quick_theirs(query, key, value)[..., :3])


def test_float16_runs_under_jit():
    output = jax.jit(dot_product_attention)(*inputs("float16"))
    assert output.dtype == jnp.float16


# Implementations and errors.


@pytest.mark.parametrize("name", [None, "xla", *dispatch.DEFAULT_ORDER])
def test_implementations_of_both_libraries_are_taken(name):
    got = dot_product_attention(*inputs(), is_causal=True, implementation=name)
    assert_close(got, quick_theirs(*inputs(), is_causal=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "cudnn"}, "runs on NVIDIA GPUs only"),
        (
            {"implementation": "triton"},
            '`implementation` must be None or one of "blockwise"',
        ),
        ({"local_window_size": 1.5}, "`local_window_size` must be one whole number or a"),
        ({"local_window_size": (1, 2, 3)}, r"a pair \(left, right\), got \(1, 2, 3\)"),
        ({"local_window_size": (-1, 2)}, "must be ≥ 0 on each side, got -1; "),
        ({"local_window_size": ("a", 2)}, "must be a whole number, got 'a'"),
        ({"local_window_size": (lengths(1, 2), 2)}, r"must be one whole number, got sh"),
        ({"local_window_size": True}, "must be one whole number or a pair .* got True; "),
        ({"implementation": lengths(1, 2)}, "must be None or one of .*; give one of"),
        (
            {"key_value_seq_lengths": lengths(1, 2, 3)},
            r"must have shape \(\) or B = ",
        ),
        ({"key_value_seq_lengths": [1.0, 2.0]}, "must hold integers, got float32"),
        ({"query_seq_lengths": "abc"}, "must be an array, got str"),
        ({"mask": jnp.ones((T, S))}, "`mask` must be Boolean .* belongs in `bias`"),
        ({"mask": booleans(3, 1, T, S)}, "must broadcast to BNTS"),
        ({"bias": booleans(T, S)}, "`bias` must be floating, got bool"),
        ({"query_seq_lengths": lengths(1, 2, 3)}, "must have shape"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        dot_product_attention(*inputs(), **options)
    (name,) = options
    if name not in ("mask", "bias") and "NVIDIA" not in message:
        start = f"jax_nn.dot_product_attention: `{name}` must "
        assert str(error.value).startswith(start)


def test_integers_are_refused():
    integers = [x.astype(jnp.int32) for x in inputs()]
    with pytest.raises(ValueError, match="`query` must have one of the dtypes"):
        dot_product_attention(*integers)
