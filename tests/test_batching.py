"""An axis of `vmap` equals the definition slice by slice, and costs what the batch does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jattn
from jattn import definition, masks, modifiers
from jattn.operations import mapped
from jattn.operations.mapped import cond_any
from tests.helpers import small_tiles

pytestmark = pytest.mark.slow

SLICES, B, T, S, N, K, H, D = 3, 2, 6, 9, 4, 2, 3, 5
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape)


def ids(*shape):
    return np.sort(rng.integers(0, 3, shape), axis=-1)


QUERY, KEY = normal(SLICES, B, T, N, H), normal(SLICES, B, S, K, H)
VALUE = normal(SLICES, B, S, K, D)
TABLE = normal(T, S)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def dropped(seed):
    return {"dropout": jattn.Dropout(0.3, jax.random.key(seed)), "mask": masks.Causal(2)}


def block_table(ids):
    query, key = jnp.zeros((B, T, N, H)), jnp.zeros((B, S, K, H))
    mask = masks.Segments(ids[:, :T], ids)
    return {"mask": jattn.block_table(mask, query, key, block=4)}


# Options of a call from an array, that array, and whether each slice has its own.
JOINED = {
    "plain": (lambda x: {}, normal(), False),
    "causal": (lambda x: {"mask": masks.Causal(2)}, normal(), False),
    "b in a mask": (lambda x: {"mask": lambda b, n, t, s: (s + b + n) % 3 > 0}, 0.0, False),
    "b in a modifier": (
        lambda x: {
            "modifier": lambda logit, b, n, t, s: logit * jnp.where(t > s, x[b], 1.0)
        },
        normal(B),
        False,
    ),
    "lengths": (
        lambda x: {"mask": masks.Lengths(x)},
        rng.integers(0, S, (SLICES, B)),
        True,
    ),
    "one length": (lambda x: {"mask": masks.Lengths(x)}, np.array([0, 3, 9]), True),
    "segments": (
        lambda x: {"mask": masks.Segments(x[:, :T], x)},
        ids(SLICES, B, S),
        True,
    ),
    "documents": (
        lambda x: {"mask": lambda b, n, t, s: x[b, t] == x[b, s]},
        ids(SLICES, B, S),
        True,
    ),
    "explicit": (lambda x: {"mask": masks.Explicit(x)}, normal(SLICES, T, S) > 0, True),
    "one position": (
        lambda x: {"mask": masks.Causal(), "query_position": x},
        np.arange(SLICES),
        True,
    ),
    "positions T": (
        lambda x: {"mask": masks.Causal(), "query_position": x},
        ids(SLICES, T) * 3,
        True,
    ),
    "positions BT": (
        lambda x: {"mask": masks.Causal(), "query_position": x[:, :T], "key_position": x},
        ids(SLICES, B, S) * 3,
        True,
    ),
    "shared positions": (
        lambda x: {"mask": masks.Causal(), "query_position": x, "modifier": ALIBI},
        ids(B, T) * 3,
        False,
    ),
    "table of blocks": (block_table, ids(SLICES, B, S), True),
    "shared table": (block_table, ids(B, S), False),
    "bias": (lambda x: {"bias": x}, normal(SLICES, B, 1, T, S), True),
    "bias without batch": (
        lambda x: {"bias": x, "mask": masks.Causal(2)},
        normal(SLICES, N, 1, S),
        True,
    ),
    "shared bias": (lambda x: {"bias": x}, normal(N, T, S), False),
    "shared bias per example": (lambda x: {"bias": x}, normal(B, 1, T, 1), False),
    "sink": (
        lambda x: {"sink": x, "mask": masks.Causal(-2)},
        normal(SLICES, N),
        True,
    ),
    "slopes": (
        lambda x: {"modifier": modifiers.ALiBi(x), "mask": masks.Causal(1)},
        normal(SLICES, N),
        True,
    ),
    "shared dropout": (dropped, 3, False),
    "dropout": (dropped, np.arange(SLICES), True),
    "captured": (lambda x: {"modifier": read_table(x)}, TABLE, False),
}
ALIBI = modifiers.ALiBi()
# Of these, each slice has something that belongs to no example.
APART = {
    "captured": (lambda x: {"modifier": read_table(x)}, normal(SLICES, T, S), True),
    "captured by a mask": (
        lambda x: {"mask": lambda b, n, t, s: x[t, s] > 0},
        normal(SLICES, T, S),
        True,
    ),
    "scale": (lambda x: {"scale": x, "mask": masks.Causal()}, normal(SLICES), True),
}
CASES = JOINED | {f"apart: {k}": v for k, v in APART.items()}


def read_table(table):
    return lambda logit, b, n, t, s: logit + table[t, s].astype(logit.dtype)


def inputs(case):
    """The arguments of a case, the axes of `vmap`, and directions of the floating ones."""
    _, x, each = CASES[case]
    x = jnp.asarray(x)
    arrays = (*map(jnp.asarray, (QUERY, KEY, VALUE)), x)
    floating = tuple(jnp.issubdtype(y.dtype, jnp.floating) for y in arrays)
    return arrays, (0, 0, 0, 0 if each else None), floating


def function(attend, case):
    """A call of slices of the arrays."""
    options = CASES[case][0]
    return lambda q, k, v, x: attend(q, k, v, **options(x))


def over(floating, f, arrays):
    """The function of the floating arrays alone, and those."""
    chosen = [x for x, flag in zip(arrays, floating, strict=True) if flag]

    def of(*chosen):
        chosen = iter(chosen)
        return f(
            *(next(chosen) if flag else x for x, flag in zip(arrays, floating, strict=True))
        )

    return of, chosen


def gradient(f, floating):
    def of(*arrays):
        chosen, x = over(floating, f, arrays)
        total = lambda *x: jnp.sum(jnp.sin(chosen(*x)))
        return jax.grad(total, tuple(range(len(x))))(*x)

    return of


def curvature(f, floating):
    """The derivative of the gradient, along all ones."""

    def of(*arrays):
        chosen, x = over(floating, gradient(f, floating), arrays)
        return jax.jvp(chosen, tuple(x), tuple(map(jnp.ones_like, x)))[1]

    return of


def tangent(f, floating):
    def of(*arrays):
        chosen, x = over(floating, f, arrays)
        return jax.jvp(chosen, tuple(x), tuple(map(jnp.cos, x)))

    return of


RUNGS = {
    "value": lambda f, axes, floating: jax.vmap(f, axes),
    "vmap of grad": lambda f, axes, floating: jax.vmap(gradient(f, floating), axes),
    "grad of vmap": lambda f, axes, floating: gradient(jax.vmap(f, axes), floating),
    "jvp of vmap": lambda f, axes, floating: tangent(jax.vmap(f, axes), floating),
    "vmap of jvp of grad": lambda f, axes, floating: jax.vmap(curvature(f, floating), axes),
    "jvp of grad of vmap": lambda f, axes, floating: curvature(jax.vmap(f, axes), floating),
    "vmap of vmap": lambda f, axes, floating: (
        lambda *arrays: jax.vmap(
            jax.vmap(gradient(f, floating), axes),
            in_axes=(0, None, 1, None),
        )(jnp.stack([arrays[0], arrays[0][::-1]]), *twice(arrays))
    ),
}


def twice(arrays):
    _, key, value, x = arrays
    return key, jnp.stack([value, 2 * value], 1), x


ALL = [(case, "vmap of grad") for case in CASES]
SOME = ("shared bias per example", "positions BT", "apart: captured")
ALL += [(case, rung) for case in SOME for rung in RUNGS]


@pytest.mark.parametrize(("case", "rung"), dict.fromkeys(ALL))
def test_vmap_equals_that_of_the_definition(case, rung):
    arrays, axes, floating = inputs(case)
    got, want = (
        jax.jit(RUNGS[rung](function(attend, case), axes, floating))(*arrays)
        for attend in (small_tiles.attention, definition.attention)
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-9, rtol=1e-9)
    jax.tree.map(close, got, want)


def jaxpr(case, transform=lambda f, floating: f):
    arrays, axes, floating = inputs(case)
    f = transform(function(jattn.attention, case), floating)
    return str(jax.make_jaxpr(jax.vmap(f, axes))(*arrays))


@pytest.mark.parametrize("case", JOINED)
def test_slices_join_the_batch(case):
    assert "operation=Mapped" not in jaxpr(case)


@pytest.mark.parametrize("case", ["lengths", "bias", "slopes", "dropout"])
def test_slices_join_the_batch_in_derivatives(case):
    assert "operation=Mapped" not in jaxpr(case, gradient)
    assert "operation=Mapped" not in jaxpr(case, tangent)


@pytest.mark.parametrize("case", APART)
def test_what_belongs_to_no_example_keeps_slices_apart(case):
    assert "operation=Mapped" in jaxpr(f"apart: {case}")


def test_slices_that_share_keys_stay_apart_so_that_these_are_not_copied():
    shared = jax.vmap(jattn.attention, (0, None, None))
    text = str(jax.make_jaxpr(shared)(QUERY, KEY[0], VALUE[0]))
    assert "operation=Mapped" in text


# In bfloat16 a sum of ones stays at 256, for 257 is rounded to it.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slices", [(600,), (30, 20)], ids=["once", "twice"])
@pytest.mark.parametrize("budget", [1, mapped.BUDGET], ids=["loop", "at once"])
@pytest.mark.parametrize("shared", [0, 1], ids=["key", "value"])
def test_cotangents_of_shared_arrays_are_rounded_once(
    monkeypatch, dtype, slices, budget, shared
):
    monkeypatch.setattr(mapped, "BUDGET", budget)
    query, keys = normal(*slices, 1, 1, 4) + 1, (normal(3, 1, 4), normal(3, 1, 4))
    given = [jnp.asarray(x).astype(dtype) for x in (query, *keys)]

    def gradient(query, *keys):
        function = functools.partial(jattn.attention, implementation="blockwise")
        for _ in slices:
            function = jax.vmap(function, (0, None, None))
        total = lambda *keys: jnp.sum(function(query, *keys), dtype=float)
        return jax.grad(total, shared)(*keys)

    got = np.asarray(gradient(*given).astype(jnp.float64))
    want = np.asarray(gradient(*(x.astype(jnp.float64) for x in given)))
    eps = float(jnp.finfo(dtype).eps)
    assert np.max(abs(got - want)) <= 0.75 * eps * np.max(abs(want))


# Arrays that rows, examples or heads share, and the options of a call that they make.
SHARED = {
    "sink of all heads": (lambda x: {"sink": x}, ()),
    "sinks": (lambda x: {"sink": x}, (2,)),
    "bias": (lambda x: {"bias": x}, (20, 1, 2, 4, 3)),
    "biases of keys": (lambda x: {"modifier": modifiers.Bias(x)}, (3,)),
    "one slope": (lambda x: {"modifier": modifiers.ALiBi(x)}, ()),
    "slopes": (lambda x: {"modifier": modifiers.ALiBi(x)}, (2,)),
    "cap": (lambda x: {"modifier": modifiers.SoftCap(2 + x * x)}, ()),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_cotangents_of_options_are_rounded_once(name, implementation):
    make, shape = SHARED[name]
    draw = np.random.default_rng(1).standard_normal
    pairs = [(4, 2), (3, 1), (3, 1), (4, 2)]  # a length and how many heads
    drawn = [draw((2, 20, 9, *pair, 4)) for pair in pairs] + [draw((2, *shape))]
    given = [jnp.asarray(x).astype(jnp.bfloat16) for x in drawn]

    def gradient(query, key, value, weight, x):
        attend = lambda query, key, value, x: jattn.attention(
            query, key, value, implementation=implementation, **make(x)
        )
        total = lambda x: jnp.vdot(
            jax.vmap(attend)(query, key, value, x).astype(float), weight.astype(float)
        )
        return jax.grad(total)(x)

    got = np.asarray(gradient(*given).astype(float))
    want = np.asarray(gradient(*(x.astype(float) for x in given)))
    # The output is rounded once, which moves nothing here, and the cotangent once.
    assert np.max(abs(got - want)) <= 0.6 * 2**-7 * np.max(abs(want))


def test_entropy_and_what_keys_receive_join_too():
    for view in (jattn.attention_entropy, jattn.attention_received):
        f = functools.partial(view, mask=lambda b, n, t, s: (s + b) % 2 == 0)
        assert "operation=Mapped" not in str(jax.make_jaxpr(jax.vmap(f))(QUERY, KEY))
        got = jax.vmap(f)(QUERY, KEY)
        for i in range(SLICES):
            np.testing.assert_allclose(got[i], f(QUERY[i], KEY[i]), atol=1e-12)


def conditions(f, *arrays):
    """Counts the conditionals of the program of a function."""
    return jax.jit(f).lower(*arrays).as_text().count("stablehlo.case")


TABLES = jnp.asarray(normal(SLICES, T, S))
CONDITIONS = {
    "joined": (lambda x: masks.Causal(), jnp.zeros(SLICES)),
    "apart": (lambda x: lambda b, n, t, s: x[t, s] > 0, TABLES),
}


@pytest.mark.parametrize(("mask", "x"), CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("folded", [False, True])
def test_no_branch_is_run_in_vain(mask, x, folded):
    """A `vmap` with a condition for each slice would run both branches for all."""
    queries = 1 if folded else T
    one = lambda q, k, v, x: jattn.attention(
        q[:, :queries], k, v, mask=mask(x), implementation="blockwise"
    )
    arrays = *map(jnp.asarray, (QUERY, KEY, VALUE)), x
    single = conditions(one, *(y[0] for y in arrays))
    assert conditions(jax.vmap(one), *arrays) == single > 0


@pytest.mark.parametrize("queries", [1, T])
def test_what_is_not_finite_stays_in_its_slice(queries):
    arrays = *(jnp.asarray(x) for x in (QUERY[:, :, :queries], KEY, VALUE)), TABLES
    seen = jnp.argmax(TABLES[1, 0])  # by the first query, and not by all of them
    value = arrays[2].at[1, 0, seen].set(jnp.nan)
    one = lambda q, k, v, x: jattn.attention(
        q, k, v, mask=lambda b, n, t, s: x[t, s] > 0, implementation="blockwise"
    )
    got = jax.vmap(one)(*arrays[:2], value, arrays[3])
    for i in range(SLICES):
        want = definition.attention(
            *(x[i] for x in arrays[:2]),
            value[i],
            mask=masks.Explicit(TABLES[i, :queries] > 0),
        )
        np.testing.assert_allclose(got[i], want, atol=1e-12)
    assert np.isnan(got[1]).any()


def test_a_condition_of_any_slice():
    x = jnp.arange(6.0).reshape(2, 3)
    mend = lambda x: jnp.where(x > 3, 0.0, x)
    one = lambda x: cond_any(x > 3, mend, lambda x: x, x) ** 2
    f = jax.vmap(jax.vmap(one))
    np.testing.assert_array_equal(f(x), [[0, 1, 4], [9, 0, 0]])
    grad = jax.grad(lambda x: jnp.sum(f(x)))(x)
    np.testing.assert_array_equal(grad, [[0, 2, 4], [6, 0, 0]])
    assert "cond[" in str(jax.make_jaxpr(f)(x))


def test_a_symbolic_number_of_slices():
    b, t = export.symbolic_shape("b, t")
    one = lambda q, k: jattn.attention(q, k, k, mask=lambda b, n, t, s: t + b >= s)
    both = lambda q, k: (
        jax.vmap(one)(q, k),
        jax.vmap(jax.grad(lambda q, k: jnp.sum(one(q, k) ** 2), (0, 1)))(q, k),
    )
    shapes = (b, 2, t, 4, 8), (b, 2, t, 2, 8)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = export.export(jax.jit(both))(*shapes)
    arrays = [jnp.float32(normal(3, 2, 5, n, 8)) for n in (4, 2)]
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, exported.call(*arrays), both(*arrays))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_slices_on_several_devices(kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    one = lambda q, k, v: jattn.attention(q, k, v, mask=masks.Causal())
    loss = lambda *x: jnp.sum(one(*x) ** 2)
    f = jax.jit(lambda *x: (jax.vmap(one)(*x), jax.vmap(jax.grad(loss, (0, 1, 2)))(*x)))
    arrays = [jnp.float32(normal(4, 2, 8, n, 4)) for n in (4, 2, 2)]
    want = f(*arrays)
    for spec in (("x",), (None, "x"), (None, None, None, "x")):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        with jax.set_mesh(mesh):
            got = f(*(jax.device_put(x, sharding) for x in arrays))
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, jax.tree.map(np.asarray, got), want)


@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
def test_rules_may_ask_for_the_slice(implementation):
    def call(query, key, value, i):
        return jattn.attention(
            query,
            key,
            value,
            mask=lambda b, n, t, s: s <= t + i(),
            modifier=lambda logit, b, n, t, s: logit * jnp.asarray(1 + i(), logit.dtype),
            implementation=implementation,
        )

    def asking(*arrays):
        return call(*arrays, lambda: jax.lax.axis_index("slice"))

    loss = lambda *arrays: jnp.sum(jnp.sin(jax.vmap(asking, axis_name="slice")(*arrays)))
    each = lambda i, *arrays: jnp.sum(jnp.sin(call(*arrays, lambda: i)))
    got = jax.grad(loss, (0, 1, 2))(QUERY, KEY, VALUE)
    for i in range(SLICES):
        want = jax.grad(each, (1, 2, 3))(i, QUERY[i], KEY[i], VALUE[i])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-12)
