"""JAX's debugging modes, and transformations that are rarely asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet

import jattn
from jattn.masks import Causal, Lengths
from jattn.modifiers import ALiBi, SoftCap
from tests.helpers.draws import normal

Q, K, V = (normal(i, (2, 6, 2, 8)) for i in range(3))

MODES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "checking_leaks": jax.checking_leaks,
    "enable_checks": lambda: jax.enable_checks(True),
}
CALLS = {
    "plain": lambda **o: jattn.attention(Q, K, V, **o),
    "empty_rows": lambda **o: jattn.attention(Q, K, V, mask=Causal(-3), **o),
    "lambda": lambda **o: jattn.attention(
        Q,
        K,
        V,
        mask=lambda b, n, t, s: (t >= s) & (s != 2),
        modifier=SoftCap(3.0) >> ALiBi(),
        **o,
    ),
    "gradient": lambda **o: jax.grad(
        lambda v: jnp.sum(
            jattn.attention(Q, K, v, mask=Causal(), sink=jnp.zeros(2), **o) ** 2
        )
    )(V),
    "hvp": lambda **o: jax.jvp(
        jax.grad(lambda q: jnp.sum(jattn.attention(q, K, V, mask=Causal(), **o) ** 2)),
        (Q,),
        (Q,),
    )[1],
    "dropout": lambda **o: jattn.attention(
        Q, K, V, dropout=jattn.Dropout(0.3, jax.random.key(0)), **o
    ),
    "vmap": lambda **o: jax.vmap(
        lambda q, k, v: jattn.attention(q, k, v, mask=Causal(), **o)
    )(Q, K, V),
}
VIEWS = {
    "weights": lambda: jattn.attention_weights(Q, K, mask=Causal(-3)),
    "entropy": lambda: jattn.attention_entropy(Q, K, mask=Causal()),
    "received": lambda: jattn.attention_received(Q, K, mask=Causal()),
    "entropy gradient": lambda: jax.grad(
        lambda q: jnp.sum(jattn.attention_entropy(q, K, mask=Causal(-3)))
    )(Q),
    "received gradient": lambda: jax.grad(
        lambda q: jnp.sum(jattn.attention_received(q, K, mask=Causal(-3)) ** 2)
    )(Q),
    "strongest": lambda: jattn.strongest_keys(Q, K, 2, mask=Causal()).weights,
    "table": lambda: jattn.block_table(Causal(), Q, K).kinds,
    "merge": lambda: jattn.merge(jattn.EMPTY, jattn.attention_state(Q, K, V)).output,
    "definition": jax.jit(lambda: jattn.definition.attention(Q, K, V)),
}


FLAT = jattn.caches.empty(2, 8, 2, 8, ragged=True, dtype="int8").append(K, V)
PAGED = jattn.caches.paged(8, 4, 2, 8, batch_size=2, max_pages=4).append(K, V)
ROLLING = jattn.caches.rolling(2, 16, 2, 8).append(K, V)
SHORT = jattn.caches.rolling(2, 2, 2, 8).append(K, V)
CACHES = {
    "attend": lambda: FLAT.attend(Q, mask=Causal()),
    "state": lambda: FLAT.attend_state(Q).logsumexp,
    "paged": lambda: PAGED.extend(Q, K, V, mask=Causal())[0],
    "tokens": lambda: PAGED.attend_tokens(Q[0], np.zeros(6, int), np.arange(6)),
    "rolling": lambda: ROLLING.extend(Q, K, V)[0],
    # Whose last queries see nothing of the ring as it was before the prompt.
    "short ring": lambda: SHORT.extend(Q, K, V, sink=jnp.zeros(2))[0],
    "gradient": lambda: jax.grad(lambda q: jnp.sum(PAGED.attend(q) ** 2))(Q),
}
MODIFIED = {
    "appended": lambda: FLAT.truncate(0).append(K, V).store.value_scales,
    "pieces": lambda: PAGED.append(K[:, :2], V[:, :2]).attend(Q),
    "capped": lambda: jattn.attention_weights(Q, K, modifier=SoftCap(3.0)),
    "logits": lambda: jattn.attention_logits(Q, K, modifier=ALiBi()),
    "dense": lambda: CALLS["lambda"](implementation="dense"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", [None, "dense"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_run_in_every_mode(name, mode, implementation):
    with MODES[mode]():
        got = CALLS[name](implementation=implementation)
    np.testing.assert_allclose(got, CALLS[name](), atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VIEWS | CACHES)
def test_views_and_caches_run_in_every_mode(name, mode):
    run = (VIEWS | CACHES)[name]
    with MODES[mode]():
        got = run()
    np.testing.assert_allclose(got, run(), atol=2e-5)


@pytest.mark.parametrize("name", VIEWS | CACHES | MODIFIED)
def test_debug_nans_without_jit(name):
    run = (VIEWS | CACHES | MODIFIED)[name]
    with jax.disable_jit(), jax.debug_nans(True):
        got = run()
    np.testing.assert_allclose(got, run(), atol=2e-5)


def test_debug_nans_finds_a_nan():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jattn.attention(Q, K, V.at[0, 0, 0, 0].set(jnp.nan))


@pytest.mark.parametrize("name", ["lambda", "gradient", "vmap"])
def test_checkify_around_a_call(name):
    for errors in (checkify.user_checks, checkify.all_checks):
        error, got = checkify.checkify(CALLS[name], errors=errors)()
        error.throw()
        np.testing.assert_allclose(got, CALLS[name](), atol=2e-5)


def test_checkify_inside_a_mask_runs_and_a_check_is_refused():
    whole = lambda b, n, t, s: checkify.checkify(lambda: t >= s)()[1]
    got = jattn.attention(Q, K, V, mask=whole)
    np.testing.assert_array_equal(got, jattn.attention(Q, K, V, mask=Causal()))

    def checked(b, n, t, s):
        checkify.check(t >= 0, "a negative position")
        return t >= s

    for call in (
        lambda: jattn.attention(Q, K, V, mask=checked),
        lambda: checkify.checkify(lambda: jattn.attention(Q, K, V, mask=checked))(),
        lambda: jattn.attention(
            Q, K, V, modifier=lambda x, *at: jnp.where(checked(*at), x, x)
        ),
    ):
        with pytest.raises(
            ValueError, match=r"must be pure, got one with a `checkify.check`"
        ):
            call()


@pytest.mark.parametrize("mask", [None, Causal(-2), Lengths(jnp.array([3, 0]))])
def test_linear_transpose_in_the_values(mask):
    attend = lambda v: jattn.attention(Q, K, v, mask=mask)
    (got,) = jax.linear_transpose(attend, V)(V)
    np.testing.assert_allclose(got, jax.vjp(attend, V)[1](V)[0], atol=1e-6)
    mapped = jax.vmap(lambda q, k, v: jattn.attention(q, k, v), (None, None, 0))
    (got,) = jax.linear_transpose(lambda v: mapped(Q, K, v), jnp.stack([V, V]))(
        jnp.stack([V, 2 * V])
    )
    want = jax.vjp(lambda v: jattn.attention(Q, K, v), V)[1](V)[0]
    np.testing.assert_allclose(got, jnp.stack([want, 2 * want]), atol=1e-5)


def _tokens(value):
    """Values as the tokens of a cache, which rounds nothing."""
    cache = jattn.caches.empty(2, 8, 2, 8).append(K, value)
    return cache.attend(Q[:, -2:], sink=jnp.array([0.5, -1.0]))


def _state_of_two(value, **options):
    state = jattn.attention_state(Q, K, value, mask=Causal(), **options)
    return jattn.merge(state, jattn.attention_state(Q, K, 2 * value, **options))


LINEAR = {
    "mask": lambda v, **o: jattn.attention(Q, K, v, mask=Causal(-2), **o),
    "sink": lambda v, **o: jattn.attention(
        Q, K, v, mask=Causal(), sink=jnp.array([0.5, -1.0]), **o
    ),
    "all": lambda v, **o: jattn.attention(
        jnp.concatenate([Q, Q], 2),
        K,
        v,
        mask=lambda b, n, t, s: (s < 3) | (t == s),
        modifier=SoftCap(3.0),
        dropout=jattn.Dropout(0.3, jax.random.key(0)),
        **o,
    ),
    "vmap": lambda v, **o: jax.vmap(
        lambda q, k, v: jattn.attention(q, k, v, mask=Causal(), sink=jnp.zeros(2), **o)
    )(Q, K, v),
    "merge": lambda v, **o: _state_of_two(v, **o),
    "twice": lambda v, **o: jattn.attention(
        Q, K, jattn.attention(Q, K, v, mask=Causal(), **o), mask=Causal(), **o
    ),
    "tangent": lambda v, **o: jax.linearize(
        lambda v: jattn.attention(Q, K, v, mask=Causal(), **o), V
    )[1](v),
}


def _check_transpose(attend):
    want, pull = jax.vjp(attend, V)
    cotangents = jax.tree.map(lambda x: normal(7, x.shape), want)
    (got,) = jax.linear_transpose(attend, V)(cotangents)
    np.testing.assert_allclose(got, pull(cotangents)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "dense") for name in ("mask", "sink", "all")),
        ("sink", None),
        *(
            pytest.param(name, x, marks=pytest.mark.slow)
            for name, x in (
                ("vmap", "dense"),
                ("merge", "dense"),
                ("twice", "dense"),
                ("tangent", "dense"),
                ("merge", None),
            )
        ),
    ],
)
def test_linear_transpose_whatever_is_asked(name, implementation):
    _check_transpose(lambda v: LINEAR[name](v, implementation=implementation))


@pytest.mark.parametrize(
    "attend", [_tokens, jattn.definition.attention_state], ids=["cache", "definition"]
)
def test_linear_transpose_elsewhere(attend):
    known = attend is _tokens
    options = {"sink": jnp.zeros(2), "mask": Causal()}
    _check_transpose(attend if known else lambda v: attend(Q, K, v, **options).output)


@pytest.mark.parametrize("implementation", [None, "dense"])
def test_linear_transpose_on_devices(implementation):
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=axis_types)
    spec = jax.sharding.PartitionSpec("x")

    @jax.jit
    def attend(v):
        part = lambda q, k, v: jattn.attention(
            q, k, v, mask=Causal(), sink=jnp.zeros(2), implementation=implementation
        )
        return jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)(Q, K, v)

    (got,) = jax.linear_transpose(attend, V)(V)
    want = jax.vjp(attend, V)[1](V)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_hidden_values_stay_hidden_in_dense():
    value = V.at[:, 4].set(jnp.nan).at[:, 5].set(jnp.inf)
    attend = lambda v: jattn.attention(Q, K, v, mask=Lengths(4), implementation="dense")
    out, tangent = jax.jvp(attend, (value,), (V,))
    want = jattn.definition.attention(Q, K, V, mask=Lengths(4))
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(tangent, want, atol=1e-5)
    assert np.isfinite(jax.vjp(attend, value)[1](V)[0]).all()
    seen = jattn.attention(Q, K, value, mask=Causal(), implementation="dense")
    np.testing.assert_array_equal(np.isnan(seen[0, :, 0, 0]), np.arange(6) >= 4)


def test_linear_transpose_elsewhere_is_refused():
    with pytest.raises(ValueError, match="must be asked in the values alone"):
        jax.linear_transpose(lambda k: jattn.attention(Q, k, V), K)(V)


@pytest.mark.parametrize("mask", [None, Causal()])
def test_jet_gives_taylor_series(mask):
    def series(function):
        return jet.jet(function, (Q, V), ((K, K), (Q, V)))

    got = series(lambda q, v: jattn.attention(q, K, v, mask=mask))
    want = series(lambda q, v: jattn.attention(q, K, v, mask=mask, implementation="dense"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)


@pytest.mark.parametrize("platforms", [("tpu", "cpu"), ("cpu", "tpu")])
def test_export_for_several_platforms_in_either_order(platforms):
    exported = jax.export.export(
        jax.jit(lambda q: jattn.attention(q, K, V, mask=Causal())), platforms=platforms
    )(Q)
    np.testing.assert_allclose(
        exported.call(Q), jattn.attention(Q, K, V, mask=Causal()), atol=1e-6
    )


def test_eager_operations_are_compiled_once():
    from jattn.operations import rules

    jax.vmap(lambda q: jattn.attention(q, K[0], V[0]))(Q)
    before = rules._compiled._cache_size()
    jax.vmap(lambda q: jattn.attention(q, K[0], V[0]))(2 * Q)
    assert rules._compiled._cache_size() == before


def test_explain_knows_of_a_bias_that_hides_keys():
    bias = jnp.zeros((1, 1, 1, 2048)).at[..., 1024:].set(-jnp.inf)
    query = jax.ShapeDtypeStruct((1, 2048, 1, 8), "float32")
    assert jattn.explain(query, query, query, bias=bias).blocks.empty == 0.5


def test_merge_takes_the_state_of_a_sink():
    state = jattn.attention_state(Q, K, V)
    for sink in (0.5, jnp.array([0.5, -1.0])):
        for merged in (
            jattn.merge(state, jattn.State(0, sink)),
            jattn.merge(jattn.State(0.0, sink), jattn.EMPTY, state),
        ):
            want = jattn.attention(Q, K, V, sink=jnp.asarray(sink))
            np.testing.assert_allclose(merged.output, want, atol=1e-6)
    with pytest.raises(ValueError, match="merge: states must have outputs"):
        jattn.merge(state, jattn.State(0, jnp.zeros(3)))


PRINTED = {
    "plain": lambda x, b, n, t, s: x,
    "an array by query": lambda x, b, n, t, s: x * jnp.cos(IDS[t]),
    "an array by key": lambda x, b, n, t, s: x + jnp.exp(IDS[s]),
    "a number of half precision": lambda x, b, n, t, s: x * HALF.astype(x.dtype),
}
IDS, HALF = jnp.arange(4, dtype="float32"), jnp.asarray(0.5, "float16")


@pytest.mark.parametrize("name", PRINTED)
def test_what_a_modifier_prints_is_printed_for_each_pair(name):
    seen = []

    def modifier(x, b, n, t, s):
        jax.debug.callback(lambda *place: seen.append(tuple(map(int, place))), t, s)
        return PRINTED[name](x, b, n, t, s)

    query = jnp.ones((1, 4, 1, 4), "float32")
    jattn.attention(query, query, query, modifier=modifier).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [(t, s) for t in range(4) for s in range(4)]
