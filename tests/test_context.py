"""Across devices: each strategy equals one device, in value and in every derivative."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import Context, masks, testing
from jattn.testing import derivatives, random_inputs
from jattn.testing.checks import scalar_of

DEVICES = 8
STRATEGIES = ("ring", "gather", "exchange", "merge")
MESH = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
CUBE = jax.make_mesh(
    (2, 2, 2), ("data", "context", "model"), axis_types=(AxisType.Auto,) * 3
)
AXIS = {"x": MESH, ("outer", "inner"): GRID}


def sized(case, many_heads):
    """The sizes of a case, as many as 8 devices divide."""
    sizes = case.sizes
    more = {letter: 8 * -(-getattr(sizes, letter) // 4) for letter in "TS"}
    if many_heads:
        more |= {"N": 8, "K": 8 if sizes.K == sizes.N else sizes.K}
        more["K"] = more["K"] if 8 % more["K"] == 0 else 8
    return dataclasses.replace(sizes, **more)


def is_cut(case):
    return case.sizes.B and case.sizes.T and case.sizes.S


def everything(case, attend, inputs):
    """Value, gradients, tangents, and the product of the Hessian with the inputs."""
    found = derivatives(case, attend, inputs)
    scalar, real = scalar_of(case, attend, inputs)
    if case.smooth:
        slopes = lambda real: jax.grad(scalar)(real)
        curved = jax.jvp(slopes, (real,), (real,))[1]
        found |= {f"h_{name}": x for name, x in curved.items()}
    return found


_everything = jax.jit(everything, static_argnums=(0, 1))


def assert_close(got, want):
    for name, x in want.items():
        x, y = np.asarray(x), np.asarray(got[name])
        scale = max(1.0, float(np.max(np.abs(x), initial=0, where=np.isfinite(x))))
        np.testing.assert_allclose(y, x, atol=2e-12 * scale, rtol=0, err_msg=name)


@functools.cache
def on_one_device(case, sizes):
    inputs = random_inputs(case, "float64", sizes=sizes)
    return inputs, _everything(case, jattn.attention_state, inputs)


@functools.cache
def spread(axis, strategy):
    context = Context(axis, strategy=strategy, mesh=AXIS[axis])
    return functools.partial(jattn.attention_state, context=context)


def compare(case, axis, strategy):
    with jax.enable_x64(True):
        sizes = sized(case, strategy == "exchange")
        inputs, want = on_one_device(case, sizes)
        assert_close(_everything(case, spread(axis, strategy), inputs), want)


CASES = {case.name: case for case in testing.CASES if is_cut(case)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name, strategy):
    compare(CASES[name], "x", strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "exchange"])
@pytest.mark.parametrize("name", ["everything", "captured", "dropout"])
def test_two_axes_equal_one_device(name, strategy):
    compare(CASES[name], ("outer", "inner"), strategy)


B, T, N, K, H = 2, 32, 8, 4, 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def inputs_of(heads=N, kv_heads=K, length=T):
    shapes = (heads, kv_heads, kv_heads)
    return [normal(i, B, length, n, H) for i, n in enumerate(shapes)]


def documents(ids, slopes):
    """Options that read examples, heads and positions of the whole."""
    return {
        "mask": lambda b, n, t, s: (t >= s) & (ids[b, t] == ids[b, s]),
        "modifier": lambda logit, b, n, t, s: (
            logit - slopes[n] * (t - s).astype(logit.dtype)
        ),
        "sink": slopes,
        "dropout": jattn.Dropout(0.2, jax.random.key(1)),
    }


def value_and_grad(call, *arguments):
    """The output, and the gradient in all of the arguments but the last."""

    def both(*arguments):
        output, pull = jax.vjp(lambda *xs: call(*xs, arguments[-1]), *arguments[:-1])
        return output, pull(jnp.cos(output))

    return jax.jit(both)(*arguments)


def close(got, want, bound=2e-13):
    check = lambda x, y: np.testing.assert_allclose(x, y, atol=bound, rtol=bound)
    jax.tree.map(check, jax.device_get(got), jax.device_get(want))


@functools.cache
def expected():
    return value_and_grad(call_documents(), *documents_inputs())


def call_documents(**options):
    def call(query, key, value, slopes, ids):
        return jattn.attention(query, key, value, **documents(ids, slopes), **options)

    return call


def documents_inputs():
    ids = np.sort(np.random.default_rng(3).integers(0, 5, (B, T)), axis=-1)
    return *inputs_of(), jnp.linspace(0.1, 0.5, N), jnp.asarray(ids)


@pytest.mark.parametrize("strategy", ["ring", "exchange"])
def test_documents_on_a_mesh_of_three_axes(strategy):
    with jax.enable_x64(True):
        context = Context(
            "context", strategy=strategy, batch="data", heads="model", mesh=CUBE
        )
        call = call_documents(context=context)
        close(value_and_grad(call, *documents_inputs()), expected())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gather", "merge"])
def test_documents_on_a_mesh_of_three_axes_by_the_others(strategy):
    test_documents_on_a_mesh_of_three_axes(strategy)


@pytest.mark.slow
def test_mesh_and_axes_of_the_context_around():
    with jax.enable_x64(True), jax.set_mesh(CUBE):
        context = Context("context", strategy="ring", batch="data")
        call = call_documents(context=context)
        close(value_and_grad(call, *documents_inputs()), expected())


@pytest.mark.slow
def test_inside_a_shard_map_over_the_batch():
    """Forward and tangents: JAX itself fails to lower residuals of a `shard_map` inside."""
    with jax.enable_x64(True):
        inputs = inputs_of()
        options = {"mask": masks.Causal(), "modifier": jattn.modifiers.ALiBi()}
        context = Context("context", strategy="ring")
        many = functools.partial(jattn.attention, context=context, **options)
        whole = jax.shard_map(
            lambda *xs: many(*xs),
            mesh=CUBE,
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names={"data"},
        )
        pushed = lambda call: jax.jit(lambda *xs: jax.jvp(call, xs, xs))(*inputs)
        with jax.set_mesh(CUBE):
            got = pushed(whole)
        close(got, pushed(functools.partial(jattn.attention, **options)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "exchange"])
def test_reverse_over_reverse(strategy):
    def twice(query, key, value, slopes, ids, **options):
        def loss(*xs):
            return jnp.sum(jnp.sin(call_documents(**options)(*xs, ids)))

        grad = jax.grad(loss, (0, 1, 2, 3))
        norm = lambda *xs: sum(jnp.sum(x**2) for x in grad(*xs))
        return jax.grad(norm, (0, 1, 2, 3))(query, key, value, slopes)

    with jax.enable_x64(True):
        context = Context("x", strategy=strategy, mesh=MESH)
        inputs = documents_inputs()
        got = jax.jit(functools.partial(twice, context=context))(*inputs)
        want = jax.jit(twice)(*inputs)
        largest = max(float(jnp.max(jnp.abs(x))) for x in want)
        close(got, want, 1e-13 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "exchange"])
def test_vmap_and_scan_of_layers(strategy):
    context = Context("x", strategy=strategy, mesh=MESH)

    def network(attend, x):
        def layer(x, _):
            keys = x[:, :, :K]
            return x + attend(x, keys, 2 * keys, mask=masks.Causal()), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0] ** 2)

    def slopes(attend, stacked):
        return jax.vmap(jax.grad(functools.partial(network, attend)))(stacked)

    with jax.enable_x64(True):
        stacked = jnp.stack([inputs_of()[0], 2 * inputs_of()[0]])
        many = functools.partial(jattn.attention, context=context)
        got = jax.jit(functools.partial(slopes, many))(stacked)
        want = jax.jit(functools.partial(slopes, jattn.attention))(stacked)
        close(got, want, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "exchange", "merge"])
def test_what_is_hidden_touches_nothing(strategy):
    """NaN in hidden keys, and rows that see nothing."""
    with jax.enable_x64(True):
        query, key, value = inputs_of()
        key, value = key.at[:, 30].set(jnp.nan), value.at[:, 31].set(jnp.inf)
        mask = lambda b, n, t, s: (t >= s + 5) & (s < 29)
        context = Context("x", strategy=strategy, mesh=MESH)

        def call(query, key, value, _, **options):
            state = jattn.attention_state(query, key, value, mask=mask, **options)
            return state.output

        got = value_and_grad(functools.partial(call, context=context), query, key, value, 0)
        close(got, value_and_grad(call, query, key, value, 0))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
        assert np.all(got[0][:, :5] == 0)


@pytest.mark.slow
def test_rounding_does_not_grow_with_devices():
    """bfloat16: the error of a ring is that of one device."""
    query, key, value = (normal(i, 1, 1024, 2, 32) for i in range(3))
    low = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    want = jattn.attention(*(x.astype(jnp.float32) for x in low))
    rms = lambda x: float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - want) ** 2)))
    one = rms(jattn.attention(*low))
    for strategy in ("ring", "gather", "merge"):
        context = Context("x", strategy=strategy, mesh=MESH)
        output = jattn.attention(*low, context=context)
        assert output.dtype == jnp.bfloat16
        assert rms(jax.device_get(output)) <= 1.3 * one


def merged(state):
    own = lambda state: jattn.merge_over(jax.tree.map(lambda x: x[0], state), "x")
    return jax.shard_map(own, mesh=MESH, in_specs=P("x"), out_specs=P())(state)


def states():
    """Makes a state for each device: some saw no key, and one is that of a sink of ∞."""
    logsumexp = np.random.default_rng(1).standard_normal((DEVICES, 5, 3))
    logsumexp[:, 0] = logsumexp[3] = -np.inf
    logsumexp[5, 1] = np.inf
    output = np.random.default_rng(0).standard_normal((DEVICES, 5, 3, 2))
    output[np.isinf(logsumexp)] = 0
    return jattn.State(jnp.asarray(output), jnp.asarray(logsumexp))


def whole(state):
    return jattn.merge(*(jattn.State(*pair) for pair in zip(*state, strict=True)))


def test_merge_over_is_merge():
    with jax.enable_x64(True):
        close(jax.jit(merged)(states()), jax.jit(whole)(states()))


@pytest.mark.slow
def test_gradients_of_merge_over():
    def loss(merge, state):
        output, logsumexp = merge(state)
        seen = jnp.where(jnp.isinf(logsumexp), 0, logsumexp)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(seen))

    with jax.enable_x64(True):
        slopes = lambda merge: jax.grad(functools.partial(loss, merge))
        close(jax.jit(slopes(merged))(states()), jax.jit(slopes(whole))(states()))
        twice = lambda merge: lambda x: jax.jvp(slopes(merge), (x,), (x,))[1]
        seen = states()._replace(logsumexp=jnp.clip(states().logsumexp, -5, 5))
        close(jax.jit(twice(merged))(seen), jax.jit(twice(whole))(seen))


def test_decoding_over_a_cache_in_shards():
    """One query, keys on eight devices: chosen without being asked for."""
    with jax.enable_x64(True):
        query, key, value = inputs_of()
        options = {"mask": masks.Causal(), "query_position": 19, "sink": jnp.ones(N)}
        call = lambda query, key, value, _, **more: jattn.attention(
            query, key, value, **options, **more
        )
        one = value_and_grad(call, query[:, :1], key, value, 0)
        many = functools.partial(call, context=Context("x", mesh=MESH))
        close(value_and_grad(many, query[:, :1], key, value, 0), one)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(None, "x"), P("y", "x"), P(None, ("y", "x"), None)])
def test_explicit_types_are_the_context(spec):
    """Takes the context from the types; output and gradients lie as their arrays do."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.enable_x64(True):
        *arrays, slopes, ids = documents_inputs()
        want = expected()
        with jax.set_mesh(mesh):
            put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
            slopes, ids = (
                jax.device_put(x, NamedSharding(mesh, P())) for x in (slopes, ids)
            )
            got = value_and_grad(call_documents(), *map(put, arrays), slopes, ids)
            whole = jax.typeof(put(arrays[0])).sharding.spec
            assert jax.typeof(got[0]).sharding.spec == whole
            assert all(jax.typeof(x).sharding.spec == whole for x in got[1][:3])
            text = str(jattn.explain(*map(put, arrays)))
        close(got, want)
        assert "8 along" in text or "4 along" in text
