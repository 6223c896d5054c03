"""Each view says of the weights what the weights themselves say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition, masks
from jattn.api import views
from jattn.api.strongest import _strongest
from jattn.arrays.shapes import unflatten_batch
from jattn.implementations import run as operation
from jattn.implementations.blockwise import sweep
from jattn.implementations.sums import state_of
from jattn.testing import CASES, random_inputs

TILE = (4, 4)  # small, so that small inputs have many
NAMES = ("two_batch_axes", "window", "by_head_and_example", "infinite_bias", "everything")
by_name = {case.name: case for case in CASES}
cases = [pytest.param(by_name[name], id=name) for name in NAMES]


def call(case, inputs):
    options = case.options(inputs)
    options.pop("dropout", None)  # which views do not take
    return inputs["query"], inputs["key"], options


def exact(case, inputs):
    """The definition's weights in float64, and its views."""
    with jax.enable_x64(True):
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        widen = lambda x: jnp.asarray(np.asarray(x, np.float64)) if is_float(x) else x
        query, key, options = call(case, jax.tree.map(widen, inputs))
        weights = definition.attention_weights(query, key, **options)
    return expected(weights, sink="sink" in options)


def in_small_tiles(query, key, views_of="ersa", k=3, *, sink=None, logsumexp=None, **rest):
    """The views that are asked for, each in tiles of 4 × 4."""
    problem, arrays = views._pose("test", query, key, logsumexp, rest | {"sink": sink})
    if logsumexp is None:  # once for all
        arrays = (*arrays[:2], state_of(operation.attend(problem, arrays[0])).logsumexp)
    runs = {
        "entropy": lambda: views._entropy(problem, False, arrays, TILE),
        "received": lambda: views._received(problem, False, arrays, TILE),
        "strongest": lambda: list(_strongest(problem, k, False, arrays, TILE)),
        "average": lambda: _strongest(problem, k, True, arrays, TILE),
    }
    shaped = lambda x: jax.tree.map(lambda x: unflatten_batch(x, problem.sizes), x)
    return {name: shaped(run()) for name, run in runs.items() if name[0] in views_of}


def expected(weights, k=3, sink=False):
    """All views, from the weights BNTS."""
    weights = np.asarray(weights, np.float64)
    logs = np.log(np.where(weights > 0, weights, 1))
    entropy = -np.sum(weights * logs, -1)
    if sink:
        rest = np.maximum(1 - np.sum(weights, -1), 1e-30)
        entropy -= rest * np.log(rest)
    return {
        "entropy": np.swapaxes(entropy, -1, -2),
        "received": np.swapaxes(np.sum(weights, -2), -1, -2),
        "strongest": [np.moveaxis(x, -3, -2) for x in ranked(weights, k)],
        "average": ranked(np.mean(weights, -3), k),
    }


def ranked(weights, k):
    weights = np.concatenate([weights, np.zeros((*weights.shape[:-1], k))], -1)
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(weights, order, -1)
    some = weights > np.finfo(np.float32).tiny
    return np.where(some, order, -1), weights


def assert_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", cases)
def test_views_equal_those_of_the_definition(case):
    inputs = random_inputs(case)
    query, key, options = call(case, inputs)
    assert_close(in_small_tiles(query, key, **options), exact(case, inputs), 2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_views_of_other_dtypes_are_exact_for_their_inputs(dtype):
    case = by_name["sink"]
    with jax.enable_x64(dtype == "float64"):
        inputs = random_inputs(case, dtype)
        query, key, options = call(case, inputs)
        got = in_small_tiles(query, key, **options)
        assert got["entropy"].dtype == ("float64" if dtype == "float64" else "float32")
        assert_close(got, exact(case, inputs), 1e-12 if dtype == "float64" else 2e-6)


def test_views_of_large_logits_are_as_exact_as_the_logits():
    # In float32 a rounding of logits of 1e4 is 1e-3, and which of equal weights is the
    # largest is up to it; tiles may round otherwise than the logsumexp's pass did.
    case = by_name["large_logits"]
    with jax.enable_x64(True):
        inputs = random_inputs(case, "float64")
        query, key, options = call(case, inputs)
        got, want = in_small_tiles(query, key, "er", **options), exact(case, inputs)
        assert_close(got, {name: want[name] for name in got}, 1e-9)


def entropy_in_full(query, key, sink):
    logits = jnp.einsum("tnh,snh->tns", query, key)
    more = jnp.broadcast_to(sink[:, None], (*logits.shape[:2], 1))
    logs = jax.nn.log_softmax(jnp.concatenate([logits, more], -1), -1)
    return -jnp.sum(jnp.exp(logs) * logs, -1)


# From 17 on, all that is not the largest weight is less than a rounding of 1.
@pytest.mark.parametrize("gap", [0.0, 0.4, 3.0, 10.0, 16.0, 20.0])
@pytest.mark.parametrize("sink", [-3.0, 0.5, 2.0])
def test_entropy_keeps_its_digits_where_it_collapses(gap, sink):
    query, key = np.full((1, 1, 1), gap), np.zeros((5, 1, 1))
    key[2], sink = 1, np.array([gap * sink])  # a key or the sink has the most weight

    def total(function, gap, key, sink):
        return jnp.sum(function(gap, key, sink))

    view = lambda q, k, sink: jattn.attention_entropy(q, k, sink=sink, scale=1.0)
    found = [jnp.asarray(x, jnp.float32) for x in (query, key, sink)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in found]
        slopes = jax.value_and_grad(functools.partial(total, entropy_in_full), (0, 2))
        want = jax.tree.map(np.asarray, slopes(*wide))
    got = jax.value_and_grad(functools.partial(total, view), (0, 2))(*found)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        # Gradients cancel where all weights are alike, as they do where the gap is 0.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * want[0])


def test_public_functions_give_these_views_and_their_means_over_heads():
    case = by_name["sink"]
    inputs = random_inputs(case)
    query, key, options = call(case, inputs)
    want = exact(case, inputs)
    entropy = jattn.attention_entropy(query, key, **options)
    received = jattn.attention_received(query, key, **options)
    got = {
        "entropy": entropy,
        "received": received,
        "strongest": list(jattn.strongest_keys(query, key, 3, **options)),
        "average": tuple(jattn.strongest_keys(query, key, 3, average=True, **options)),
    }
    assert_close(got, want, 2e-6)
    with pytest.deprecated_call(match=r"attention_entropy: .* write `.mean\(-1\)`"):
        mean = jattn.attention_entropy(query, key, average=True, **options)
    np.testing.assert_allclose(mean, entropy.mean(2), rtol=1e-6)
    with pytest.deprecated_call(match="attention_received: "):
        mean = jattn.attention_received(query, key, average=True, **options)
    np.testing.assert_allclose(mean, received.mean(2), rtol=1e-6)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_logsumexp_is_taken_as_given():
    query, key = normal(5, 2, 3), normal(6, 2, 3, seed=1)
    state = jattn.attention_state(query, key, key)
    twice = in_small_tiles(query, key, "er", logsumexp=state.logsumexp + jnp.log(2.0))
    once = in_small_tiles(query, key, "er")
    np.testing.assert_allclose(2 * twice["received"], once["received"], rtol=1e-5)
    given = in_small_tiles(query, key, "er", logsumexp=state.logsumexp)
    assert_close(given, once, 1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_of_equal_weights_the_first_key_wins(average):
    # Of the blocks of a window the middle ones are full, which other loops take first.
    query = jnp.zeros((32, 2, 1))
    problem, arrays = views._pose("test", query, query, None, {"mask": masks.Window(9, 9)})
    indices, weights = _strongest(problem, 3, average, arrays, TILE)
    first = np.maximum(np.arange(32) - 9, 0)
    last = np.minimum(np.arange(32) + 9, 31)
    rows = indices[0] if average else indices[0, :, 1]
    np.testing.assert_array_equal(rows, first[:, None] + np.arange(3))
    np.testing.assert_allclose(weights[0].reshape(32, -1)[:, 0], 1 / (last - first + 1))


def test_a_sink_of_infinity_takes_everything():
    query = normal(1, 3, 2, 4)
    sink = jnp.array([jnp.inf, -jnp.inf])
    entropy = jattn.attention_entropy(query, query, sink=sink)
    without = jattn.attention_entropy(query, query)
    np.testing.assert_array_equal(entropy[..., 0], 0)
    np.testing.assert_allclose(entropy[..., 1], without[..., 1], atol=1e-6)
    found = jattn.strongest_keys(query, query, np.int64(1), sink=sink)
    np.testing.assert_array_equal(found.indices[..., 0, 0], -1)


@pytest.mark.parametrize("view", [jattn.attention_entropy, jattn.attention_received])
@pytest.mark.parametrize("S", [0, 2])
@pytest.mark.parametrize("sink", [-jnp.inf, 0.0, jnp.inf])
def test_a_query_that_sees_nothing_gives_a_sink_no_gradient(view, S, sink):
    query, key, mask = jnp.ones((3, 2, 4)), jnp.ones((S, 2, 4)), lambda b, n, t, s: t < 0
    total = lambda sink: jnp.sum(view(query, key, mask=mask, sink=sink))
    np.testing.assert_array_equal(jax.grad(total)(jnp.full(2, sink)), 0)


def test_more_keys_than_there_are_have_index_minus_one():
    query, key = jnp.zeros((1, 1, 2)), jnp.zeros((2, 1, 2))
    indices, weights = jattn.strongest_keys(query, key, 4)
    np.testing.assert_array_equal(indices, [[[0, 1, -1, -1]]])
    np.testing.assert_array_equal(weights, [[[0.5, 0.5, 0, 0]]])


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (0, 0)])
def test_views_of_nothing_are_zero(T, S):
    query, key = jnp.zeros((2, T, 2, 3)), jnp.zeros((2, S, 1, 3))
    assert not jnp.any(jattn.attention_entropy(query, key, sink=0.0))
    assert jattn.attention_entropy(query, key).shape == (2, T, 2)
    received = jattn.attention_received(query, key)
    assert received.shape == (2, S, 2)
    assert not jnp.any(received)
    indices, weights = jattn.strongest_keys(query, key, 2, average=True)
    assert indices.shape == weights.shape == (2, T, 2)
    assert jnp.all(indices == -1)
    assert not jnp.any(weights)


def test_no_query_heads_give_no_results():
    query, key = jnp.zeros((2, 3, 0, 4)), jnp.zeros((2, 3, 1, 4))
    attend = lambda key: jattn.attention_state(query, key, key, mask=masks.Causal())
    assert attend(key).output.shape == (2, 3, 0, 4)
    assert attend(key).logsumexp.shape == (2, 3, 0)
    assert not jnp.any(jax.grad(lambda key: jnp.sum(attend(key).output))(key))
    assert jattn.attention_entropy(query, key).shape == (2, 3, 0)
    assert jattn.attention_received(query, key).shape == (2, 3, 0)
    assert jattn.strongest_keys(query, key, 2).indices.shape == (2, 3, 0, 2)


@pytest.mark.parametrize("which", ["query", "key"])
def test_nan_touches_only_who_sees_it(which):
    query, key = normal(8, 2, 3), normal(8, 2, 3, seed=1)
    mask = lambda b, n, t, s: (t < 5) == (s < 5)
    want = in_small_tiles(query, key, mask=mask)
    spoiled = {"query": query, "key": key}
    spoiled[which] = spoiled[which].at[6].set(jnp.nan)
    got = in_small_tiles(**spoiled, mask=mask)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[:5], y[:5]), got, want)
    assert jnp.all(jnp.isnan(got["entropy"][6]))
    assert jnp.all(jnp.isnan(got["received"][5:]))
    assert jnp.all(got["strongest"][0][6] == -1)
    assert jnp.all(jnp.isnan(got["strongest"][1][6]))
    rest = jnp.array([5, 7])
    assert jnp.all(jnp.isnan(got["average"][1][rest])) == (which == "key")


def test_vmap_equals_a_loop():
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2]])
    queries, key = normal(2, 7, 2, 3), normal(7, 1, 3, seed=1)

    def look(query, ids):
        mask = lambda b, n, t, s: (ids[t] == ids[s]) & (t >= s)
        return in_small_tiles(query, key, mask=mask)

    got = jax.jit(jax.vmap(look))(queries, ids)
    for i in range(2):
        one = look(queries[i], ids[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), one, 2e-6)


def objective(look, weights, query, key, x):
    """A scalar of entropy and received attention, that depends on everything."""
    options = {
        "mask": lambda b, n, t, s: (t > s) | (n == 1) & (s != 5),  # a row sees nothing
        "modifier": lambda logit, b, n, t, s: logit * x[n] + x[n],
        "bias": x[:, None, None] * weights,
        "sink": x[0],
    }
    entropy, received = look(query, key, **options)
    return jnp.sum(jnp.sin(entropy)) + jnp.sum(jnp.sin(3 * received))


def by_definition(query, key, sink, **options):
    weights = definition.attention_weights(query, key, sink=sink, **options)
    rest = 1 - jnp.sum(weights, axis=-1, keepdims=True)
    every = jnp.concatenate([weights, rest], axis=-1)
    seen = every > 1e-9
    entropy = -jnp.sum(jnp.where(seen, every * jnp.log(jnp.where(seen, every, 1)), 0), -1)
    return jnp.swapaxes(entropy, -1, -2), jnp.swapaxes(jnp.sum(weights, -2), -1, -2)


@pytest.mark.parametrize("climb", ["grad", "jvp of grad"])
def test_derivatives_equal_those_of_the_definition(climb):
    def in_tiles(query, key, **options):
        got = in_small_tiles(query, key, "er", **options)
        return got["entropy"], got["received"]

    with jax.enable_x64(True):
        wide = functools.partial(normal, dtype=jnp.float64)
        x = wide(7, 2, 3), wide(7, 1, 3, seed=1), wide(2, seed=2)
        v = wide(7, 2, 3, seed=3), wide(7, 1, 3, seed=4), wide(2, seed=5)

        def derivative(look):
            f = functools.partial(objective, look, wide(2, 1, 7, seed=6))
            gradient = jax.grad(f, (0, 1, 2))
            return gradient(*x) if climb == "grad" else jax.jvp(gradient, x, v)

        got, want = (
            jax.jit(lambda f=f: derivative(f))() for f in (in_tiles, by_definition)
        )
        assert_close(got, want, 1e-9)


def test_strongest_keys_refuses_a_derivative():
    f = lambda query: jnp.sum(jattn.strongest_keys(query, query, 1).weights)
    with pytest.raises(ValueError, match="strongest_keys: has no derivative; give it"):
        jax.grad(f)(normal(3, 1, 2))
    assert jax.grad(lambda x: f(jax.lax.stop_gradient(x)))(normal(3, 1, 2)).shape == (
        3,
        1,
        2,
    )


VIEWS = {
    "entropy": jattn.attention_entropy,
    "its gradient": jax.grad(lambda *x, **y: jnp.sum(jattn.attention_entropy(*x, **y))),
    "received": jattn.attention_received,
    "strongest": functools.partial(jattn.strongest_keys, k=4),
    "average": functools.partial(jattn.strongest_keys, k=4, average=True),
    "weights": functools.partial(jattn.attention_weights, rows=[1, 5]),
}


def temporaries(view, T):
    x = [jax.ShapeDtypeStruct((T, 2, 16), jnp.float32)] * 2
    look = lambda query, key: view(query, key=key, mask=masks.Causal())
    return jax.jit(look).lower(*x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_is_linear(view):
    one, two = temporaries(view, 8192), temporaries(view, 16384)
    assert two <= 2.1 * one + 1e5
    assert two < 16384**2


RUNS = {
    "entropy": views._entropy,
    "received": views._received,
    "strongest": lambda problem, *rest: _strongest(problem, 2, *rest),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_empty_tiles_are_skipped(monkeypatch, run):
    visits = []

    def counted(*args):
        jax.debug.callback(lambda: visits.append(1))
        return original(*args)

    original = sweep.products_of
    monkeypatch.setattr(sweep, "products_of", counted)
    x = normal(64, 1, 3)
    problem, arrays = views._pose("test", x, x, x[..., 0], {"mask": masks.Causal()})
    jax.block_until_ready(run(problem, False, arrays, (16, 16)))
    jax.effects_barrier()
    assert len(visits) == 36  # of 8 × 8 cells of 8 × 8 pairs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "`k` must be a Python integer above 0 and below 2³⁰, got 0"),
        (
            {"k": 2**31},
            "`k` must be a Python integer above 0 and below 2³⁰, got 2147483648",
        ),
        ({"k": 2.0}, "`k` must be a Python integer above 0 and below 2³⁰, got 2.0"),
        (
            {"logsumexp": jnp.zeros((3, 2))},
            r"`logsumexp` must be BTN = \(3, 1\) and floating, got float32\[3, 2\]",
        ),
        ({"sink": jnp.zeros(2)}, "strongest_keys: `sink` must be one number or N"),
    ],
)
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        jattn.strongest_keys(normal(3, 1, 2), normal(4, 1, 2), **{"k": 2, **options})


def test_known_rows_are_checked_inside_a_compiled_program_too():
    x = jnp.ones((4, 1, 8))
    looks = lambda rows: jax.jit(lambda x: jattn.attention_weights(x, x, rows=rows))
    assert looks(jnp.array([1, 3]))(x).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="within the T=4 queries, got 1…4"):
        looks(jnp.array([1, 4]))(x)


@pytest.mark.parametrize("view", [jattn.attention_entropy, jattn.attention_received])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("what", ["query", "key", "slope", "slopes"])
def test_gradients_in_half_precision_are_rounded_once(view, dtype, what):
    """That by the normalizer and that by the weights mostly cancel."""
    draw = np.random.default_rng(0).standard_normal
    given = {name: jnp.asarray(draw((1, 512, 2, 8)), dtype) for name in ("query", "key")}
    given |= {"slope": jnp.asarray(0.75, dtype), "slopes": jnp.asarray([0.7, 0.9], dtype)}
    factor = jnp.asarray(abs(draw((1, 512, 1))), jnp.float32)

    def total(x, dtype):
        inputs = given | {what: x}
        far = lambda t, s: jnp.abs(t - s).astype("float32") / 200
        slope = lambda n: inputs["slopes"][n].astype("float32") + inputs["slope"]
        modifier = lambda x, b, n, t, s: x - slope(n).astype("float32") * far(t, s)
        arrays = (inputs[name].astype(dtype) for name in ("query", "key"))
        return jnp.sum(view(*arrays, modifier=modifier) * factor)

    with jax.numpy_dtype_promotion("standard"):
        got = jax.grad(total)(given[what], dtype)
        want = jax.grad(total)(given[what].astype("float32"), "float32")
    error = np.max(np.abs(np.float32(got) - np.float32(want)))
    assert error <= float(jnp.finfo(dtype).eps) * np.max(np.abs(np.float32(want)))


@pytest.mark.parametrize("sizes", [(300, 2), (1000, 5), (40, 40)])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("options", [{}, {"mask": masks.Causal(), "sink": np.float32(1)}])
def test_gradients_of_received_are_as_exact_as_of_all_weights(options, num_kv_heads, sizes):
    """Of many queries by few keys: two sums over all of them would have to cancel."""
    (T, S), found, near = sizes, [], []

    def by_weights(query, key):
        weights = jattn.attention_weights(query, key, **options)
        return jnp.moveaxis(weights.sum(2), 1, 2)

    def slopes(function, inputs, cotangent):
        loss = lambda *inputs: jnp.sum(function(*inputs) * cotangent)
        return [np.asarray(x, "float64") for x in jax.grad(loss, (0, 1))(*inputs)]

    by_view = functools.partial(jattn.attention_received, **options)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        shapes = (1, T, 4, 8), (1, S, num_kv_heads, 8), (1, S, 4)
        *inputs, cotangent = (rng.standard_normal(x).astype("float32") for x in shapes)
        with jax.enable_x64(True):
            wide = [x.astype("float64") for x in inputs]
            want = slopes(by_weights, wide, cotangent.astype("float64"))
        for errors, function in ((found, by_view), (near, by_weights)):
            pairs = zip(slopes(function, inputs, cotangent), want, strict=True)
            errors.append([np.max(np.abs(x - y)) for x, y in pairs])
    assert np.all(np.median(found, 0) <= 1.5 * np.median(near, 0))
