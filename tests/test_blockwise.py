"""What is particular to the blockwise implementation."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jattn
from jattn import definition, masks, modifiers
from jattn.call.pose import pose
from jattn.implementations import dense
from jattn.implementations import run as operation
from jattn.implementations.blockwise import forward
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import plan
from jattn.implementations.blockwise.products import columns_of, products_of
from tests.helpers import small_tiles
from tests.helpers.draws import normal
from tests.helpers.params import quick_and_slow

blockwise_attention = functools.partial(jattn.attention, implementation="blockwise")
dense_attention = functools.partial(jattn.attention, implementation="dense")
blockwise_state = functools.partial(jattn.attention_state, implementation="blockwise")


def random(*shape, seed=0, dtype=jnp.float64):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def inputs(B=2, T=7, S=9, N=4, K=2, H=3, D=5, dtype=jnp.float64):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, D)
    return tuple(random(*x, seed=i, dtype=dtype) for i, x in enumerate(shapes))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# Each is the options of a call, from an array that they depend on, and that array.
CASES = {
    "plain": (lambda x: {}, random()),
    "causal": (lambda x: {"mask": masks.Causal()}, random()),
    "lambda": (lambda x: {"mask": lambda b, n, t, s: (t > s) & (n + b > 0)}, random()),
    "bias": (lambda x: {"bias": x}, random(4, 7, 9)),
    "bias broadcast": (lambda x: {"bias": x, "mask": masks.Causal()}, random(2, 1, 1, 9)),
    "scale": (lambda x: {"scale": x, "mask": masks.Causal(2)}, random()),
    "soft cap": (lambda x: {"modifier": modifiers.SoftCap(1 + x**2)}, random()),
    "alibi": (
        lambda x: {"modifier": modifiers.ALiBi(x), "mask": masks.Causal()},
        random(4),
    ),
    "relative": (lambda x: {"modifier": modifiers.RelativeBias(x)}, random(4, 7)),
    "sink": (lambda x: {"sink": x, "mask": masks.Causal(-2)}, random(4)),
    "dropout": (
        lambda x: {"dropout": jattn.Dropout(0.3, jax.random.key(1))},
        random(),
    ),
}


def objective(attention_state, options):
    """A scalar of both outputs, nonlinear in each."""

    def of(query, key, value, x):
        output, logsumexp = attention_state(query, key, value, **options(x))
        logsumexp = jnp.where(logsumexp == -jnp.inf, 0, logsumexp)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(logsumexp))

    return of


def dot(x, y):
    return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))


GRAD = functools.partial(jax.grad, argnums=(0, 1, 2, 3))
LADDER = {
    "value_and_grad": lambda f, x, v: (f(*x), GRAD(f)(*x)),
    "jvp": lambda f, x, v: jax.jvp(f, x, v),
    "linearize": lambda f, x, v: jax.linearize(f, *x)[1](*v),
    "jvp of grad": lambda f, x, v: jax.jvp(GRAD(f), x, v),
    "grad of jvp": lambda f, x, v: GRAD(lambda *x: jax.jvp(f, x, v)[1])(*x),
    "grad of grad": lambda f, x, v: GRAD(lambda *x: dot(GRAD(f)(*x), v))(*x),
    "jvp of jvp": lambda f, x, v: jax.jvp(lambda *x: jax.jvp(f, x, v)[1], x, v),
    "jacfwd": lambda f, x, v: jax.jacfwd(f)(*x),
    "hessian": lambda f, x, v: jax.hessian(lambda q: f(q[:, None], *x[1:]))(x[0][:, 0]),
    "vmap of grad": lambda f, x, v: jax.vmap(
        lambda a: GRAD(f)(x[0], a * x[1], x[2], a * x[3])
    )(jnp.arange(3.0)),
    "grad of vmap": lambda f, x, v: GRAD(
        lambda *x: jnp.sum(jax.vmap(lambda a: f(a * x[0], *x[1:]))(jnp.arange(3.0)))
    )(*x),
    "checkpoint": lambda f, x, v: GRAD(jax.checkpoint(f))(*x),
    "scan": lambda f, x, v: GRAD(
        lambda *x: jax.lax.scan(
            lambda c, a: (c + f(a * x[0], *x[1:]), c), 0.0, x[0][0, :3, 0, 0]
        )[0]
    )(*x),
}


# Every case on two rungs that reach all the code, and one case on every rung.
RUNGS = [(case, rung) for case in CASES for rung in ("jvp of grad",)]
RUNGS += [("alibi", rung) for rung in LADDER if rung != "hessian"] + [("plain", "hessian")]


QUICK = {("relative", "jvp of grad"), ("alibi", "grad of grad"), ("alibi", "vmap of grad")}


@pytest.mark.parametrize(("case", "rung"), quick_and_slow(dict.fromkeys(RUNGS), QUICK))
def test_derivatives_equal_those_of_the_definition(case, rung):
    options, x = CASES[case]
    x = (*inputs(T=1 if rung == "hessian" else 7), x)
    v = tuple(random(*y.shape, seed=9) for y in x)
    climb = lambda state: LADDER[rung](objective(state, options), x, v)
    got = jax.jit(lambda: climb(small_tiles.attention_state))()
    want = jax.jit(lambda: climb(definition.attention_state))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), got, want)


def temporaries(function, T, **shape):
    x = inputs(B=1, T=T, S=T, N=2, K=2, H=16, D=16, dtype=jnp.float32)
    compiled = jax.jit(function).lower(*x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "rung",
    quick_and_slow(
        ["value_and_grad", "jvp", "jvp of grad", "grad of grad"], ["jvp of grad"]
    ),
)
def test_memory_is_linear(rung):
    def climb(*x):
        f = lambda q, k, v, _: jnp.sum(blockwise_attention(q, k, v, mask=masks.Causal()))
        x = (*x, jnp.float32(0))
        return LADDER[rung](f, x, x)

    one, two = temporaries(climb, 4096), temporaries(climb, 8192)
    assert two <= 2.1 * one


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("which", ["query", "key", "value", "cotangent"])
def test_not_finite_where_masked_touches_nothing(which, bad):
    query, key, value = inputs(T=8, S=8)
    d_output = jnp.ones((2, 8, 4, 5))
    # Queries see only keys of their own half; spoil one of the second half.
    mask = lambda b, n, t, s: (t < 5) == (s < 5)
    arrays = {"query": query, "key": key, "value": value, "cotangent": d_output}
    spoiled = {**arrays, which: jnp.asarray(arrays[which]).at[:, 6].set(bad)}

    def run(query, key, value, cotangent):
        f = functools.partial(small_tiles.attention, mask=mask)
        output, pull = jax.vjp(f, query, key, value)
        return output, *pull(cotangent)

    for got, want in zip(run(**spoiled), run(**arrays), strict=True):
        np.testing.assert_allclose(got[:, :5], want[:, :5], atol=1e-12)


HIDDEN = np.where(np.arange(64) < 40, 0.0, -np.inf)
SKIPPING = {  # and how many pairs are visited, in tiles of 16 × 16 or in cells of 8 × 8
    "causal": ({"mask": masks.Causal()}, 6 * 256 + 4 * 3 * 64),
    "window": ({"mask": masks.Window(7, 0)}, (8 + 7) * 64),
    "bias of keys": ({"bias": HIDDEN[None]}, 12 * 256),
    "bias of queries": ({"bias": HIDDEN[:, None]}, 12 * 256),
    "both": ({"mask": masks.Causal(), "bias": HIDDEN[None]}, 5 * 256 + 10 * 64),
    "bias of both": ({"bias": HIDDEN[:, None] + HIDDEN}, 16 * 256),
}


@pytest.mark.parametrize(("options", "pairs"), SKIPPING.values(), ids=SKIPPING)
def test_empty_tiles_are_skipped(monkeypatch, options, pairs):
    visits = []

    def visited(layout_, query, key):
        count = query.shape[2] * key.shape[2]
        jax.debug.callback(lambda: visits.append(count))
        return original(layout_, query, key)

    original = forward.products_of
    monkeypatch.setattr(forward, "products_of", visited)
    x = inputs(B=1, T=64, S=64, N=1, K=1)
    problem, operands = pose("test", *x, **options)
    run = jax.jit(functools.partial(operation.attend, problem, tile=(16, 16)))
    want = dense.Dense().attend(problem, operands).output
    np.testing.assert_allclose(run(operands).output, want, atol=1e-12)
    jax.effects_barrier()
    assert sum(visits) == pairs


LONG = {  # T and S, of which none is whole blocks of keys
    "a step of decoding": (1, 8191),
    "a step of one over": (1, 8193),
    "few queries": (64, 3001),
    "one over": (64, 4097),
}


@pytest.mark.parametrize("options", [{}, {"mask": masks.Causal(2000)}], ids=["all", "some"])
@pytest.mark.parametrize("name", quick_and_slow(LONG, ["one over"]))
def test_keys_and_values_are_not_padded(name, options):
    T, S = LONG[name]
    x = inputs(B=1, T=T, S=S, N=1, K=1, H=4, D=4, dtype=jnp.float32)
    f = functools.partial(blockwise_attention, **options)
    loss = lambda *x: jnp.sum(jnp.sin(f(*x)))

    def run(*x):
        return jax.jvp(f, x, x), jax.grad(loss, (0, 1, 2))(*x)

    compiled = jax.jit(run).lower(*x).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(int(n) for shape in shapes for n in shape.split(",")) == S
    f = functools.partial(dense_attention, **options)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, compiled(*x), jax.jit(run)(*x))


@pytest.mark.parametrize(
    "case", quick_and_slow(["plain", "causal", "relative", "dropout"], ["causal"])
)
def test_the_last_block_counts_no_key_twice(case):
    options, x = CASES[case]
    x = (*inputs(T=7, S=13), x)
    f = lambda state: GRAD(objective(state, options))(*x)
    got, want = f(small_tiles.attention_state), f(definition.attention_state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), got, want)


def test_values_of_size_0_give_the_logsumexp():
    x = inputs(T=8, S=8, D=0)
    got, want = (
        f.attention_state(*x, mask=masks.Causal()).logsumexp
        for f in (small_tiles, definition)
    )
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_two_runs_are_bitwise_equal():
    x = inputs(T=300, S=700, dtype=jnp.float32)
    run = jax.jit(jax.grad(lambda *x: jnp.sum(blockwise_attention(*x) ** 2), (0, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, run(*x), run(*x))


@pytest.mark.parametrize(
    "axes", [(0, None, None, None), (None, 0, 1, 0), (None,) * 3 + (0,)]
)
def test_vmap_of_any_operand_is_a_loop(axes):
    def one(query, key, value, ids):
        mask = lambda b, n, t, s: (ids[t] == ids[s]) & (t >= s)
        return small_tiles.attention(query, key, value, mask=mask)

    query, key, value = inputs(T=8, S=8)
    ids = jnp.repeat(jnp.arange(4), 2)
    x = [
        y if axis is None else jnp.stack([y, y + 1, y[::-1]], axis)
        for y, axis in zip((query, key, value, ids), axes, strict=True)
    ]
    got = jax.vmap(one, axes)(*x)
    for i in range(3):
        at = [y if a is None else jnp.take(y, i, a) for y, a in zip(x, axes, strict=True)]
        np.testing.assert_allclose(got[i], one(*at), atol=1e-12)


def test_named_residuals_are_saved():
    policy = jax.checkpoint_policies.save_only_these_names(
        "jattn_output", "jattn_logsumexp"
    )
    counts = {}
    for name, options in {"saved": {"policy": policy}, "all": {}}.items():
        f = jax.checkpoint(lambda *x: jnp.sum(blockwise_attention(*x) ** 2), **options)
        jaxpr = str(jax.make_jaxpr(jax.grad(f))(*inputs()))
        counts[name] = jaxpr.count("operation=Attention")
    assert counts["saved"] < counts["all"]


def test_export_with_symbolic_sizes_for_all_platforms():
    b, t, s = export.symbolic_shape("b, t, s")
    shapes = (b, t, 4, 16), (b, s, 2, 16), (b, s, 2, 16)
    x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    f = lambda q, k, v: blockwise_attention(q, k, v, mask=masks.Causal(1))
    both = lambda *x: (f(*x), jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))(*x))
    exported = export.export(jax.jit(both), platforms=("cpu", "cuda", "tpu"))(*x)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    for T, S in ((7, 9), (300, 700)):
        x = inputs(T=T, S=S, H=16, D=16, dtype=jnp.float32)
        want = both(*x)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-5),
            exported.call(*x),
            want,
        )


SHARDED = """
import functools, sys, jax, jax.numpy as jnp, numpy as np, jattn
from jax.sharding import NamedSharding, PartitionSpec
from tests.helpers.draws import normal
kind = getattr(jax.sharding.AxisType, sys.argv[1])
mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(kind, kind))
put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("b", None, "n")))
f = functools.partial(jattn.attention, implementation="blockwise")
f = functools.partial(f, mask=jattn.masks.Causal())
g = jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2)))
x = [normal(i, (4, 96, n, 8)) for i, n in enumerate((4, 2, 2))]
y = [put(a) for a in x]
for function in (jax.jit(f), g):
    text = function.lower(*y).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text, text
    for a, b in zip(jax.tree.leaves(function(*x)), jax.tree.leaves(function(*y))):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert b.sharding.spec[0] == "b"
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_inputs_are_not_gathered(kind):
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, kind],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("R", [3, 15, 16, 20, 40, 80, 96, 180])
@pytest.mark.parametrize("S", [1, 2, 5, 21, 32, 90, 128])
def test_logits_of_both_passes_are_equal_in_every_bit(R, S, dtype):
    query = normal(0, (1, 2, R, 16)) * 1e8
    key = normal(1, (1, 2, S, 16)).astype(dtype)
    problem, operands = pose("exactness", *(jnp.zeros((4, 1, 16), dtype),) * 3)
    layout = Layout(problem, operands, plan(problem, False))
    forward = jax.jit(lambda q, k: products_of(layout, q, k))
    backward = jax.jit(lambda q, k: columns_of(q, k.astype(q.dtype), q.dtype))
    np.testing.assert_array_equal(
        forward(query, key), jnp.swapaxes(backward(query, key), 2, 3)
    )


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("mask", [None, masks.Causal(700)])
def test_weights_of_heads_of_one_number_add_up_to_one(mask, size):
    query, key = (normal(i, (1, n, h, 1)) for i, (n, h) in enumerate([(40, 2), (700, 1)]))
    query = size * query
    attend = lambda value: jattn.attention(query, key, value, mask=mask)
    output, pull = jax.vjp(attend, jnp.ones((1, 700, 1, 3), "float32"))
    np.testing.assert_allclose(output, 1, rtol=2e-6)
    np.testing.assert_allclose(jnp.sum(pull(jnp.ones_like(output))[0]), 240, rtol=2e-6)
    entropy = jattn.attention_entropy(query, key, mask=mask)
    weights = jattn.attention_weights(query, key, mask=mask)
    want = jnp.moveaxis(jnp.sum(jax.scipy.special.entr(weights), axis=-1), 1, 2)
    np.testing.assert_allclose(entropy, want, atol=1e-4)
