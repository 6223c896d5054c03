"""Arrays on meshes with explicit axes: every call equals that of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import jattn
from jattn import masks, modifiers
from tests.helpers.meshes import (
    BIAS,
    IDS,
    INPUTS,
    LENGTHS,
    RNG,
    SLOPES,
    TABLE,
    P,
    T,
    close,
    far,
    mesh_of,
)

pytestmark = pytest.mark.slow

HELD = {
    "ids": IDS,
    "lengths": LENGTHS,
    "slopes": SLOPES,
    "bias": BIAS,
    "table": TABLE,
    "allowed": BIAS < 0.5,
    "position": jnp.arange(T)[::-1],
}


# Functions of what the call holds to its options.
CALLS = {
    "plain": lambda x: {},
    "ids": lambda x: {
        "mask": lambda b, n, t, s: x["ids"][b, t] == x["ids"][b, s],
        "sink": x["slopes"],
    },
    "take": lambda x: {
        "mask": lambda b, n, t, s: (
            (jnp.take(x["ids"][b], t) == x["ids"][b, s]) & (t // 2 >= s // 2)
        )
    },
    "named": lambda x: {
        "mask": masks.Segments(x["ids"]) & masks.Causal() | masks.Lengths(x["lengths"]),
        "modifier": modifiers.ALiBi(x["slopes"]) >> modifiers.SoftCap(5.0),
    },
    "slopes": lambda x: {
        "mask": lambda b, n, t, s: s < x["lengths"][b],
        "modifier": lambda logit, b, n, t, s: (
            logit - jax.nn.relu(x["slopes"])[n] * far(t, s) + x["table"][t - s]
        ),
    },
    "bias": lambda x: {
        "bias": x["bias"],
        "mask": x["allowed"],
        "dropout": jattn.Dropout(0.3, RNG),
    },
    "biases": lambda x: {
        "modifier": lambda logit, b, n, t, s: logit + x["bias"][b, n, t, s],
        "mask": masks.Causal(),
        "query_position": x["position"],
        "key_position": x["position"],
    },
}

# How query, and key with value, are cut; then how arrays that a call holds are, by rank.
CUTS = {
    "batch": (P("x"), P("x"), (P("x"), P("x"), P("x"))),
    "heads": (P(None, None, "x"), P(None, None, "x"), (P("y"), P(None, "x"), P(None, "x"))),
    "uneven heads": (P(None, None, ("x", "y")), P(), (P(("x", "y")), P("y", "x"), P())),
    "queries": (P(None, "x"), P(), (P(), P(None, ("x", "y")), P(None, None, "x"))),
    "keys": (P(), P(None, "x"), (P("x"), P(None, "y"), P(None, None, "y", "x"))),
    "both": (P("y", "x"), P("y", "x"), (P("x"), P("y", "x"), P("y", None, "x"))),
    "sizes": (P(None, None, None, "x"), P(None, None, None, "x"), (P(), P("x", "y"), P())),
    "two on one": (P(("x", "y")), P(("x", "y")), (P(("x", "y")), P(("y", "x")), P())),
}


EXPLICIT = mesh_of(AxisType.Explicit)


def cut(mesh, name):
    query, key, held = CUTS[name]
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    specs = {"query": query, "key": key, "value": key}
    inputs = {name: put(x, specs[name]) for name, x in INPUTS.items()}
    places = {1: held[0], 2: held[1], 4: held[2]}
    return inputs, {name: put(x, places[x.ndim]) for name, x in HELD.items()}


def is_real(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def derived(options, implementation=None):
    """Value, tangent and gradients of a call, of its inputs and what it holds."""

    def everything(inputs, held):
        real = {name: x for name, x in held.items() if is_real(x)}
        rest = {name: x for name, x in held.items() if not is_real(x)}

        def call(inputs, real):
            return jattn.attention(
                **inputs, **options(real | rest), implementation=implementation
            )

        output, pull = jax.vjp(call, inputs, real)
        return output, jax.jvp(call, (inputs, real), (inputs, real))[1], pull(output)

    return jax.jit(everything)


@functools.cache
def on_one_device(name, implementation):
    return derived(CALLS[name], implementation)(INPUTS, HELD)


# Each call under some of the cuts; together all of both.
PAIRS = [
    (name, cut_name, implementation)
    for i, name in enumerate(CALLS)
    for j, cut_name in enumerate(CUTS)
    for k, implementation in enumerate(("blockwise", "dense"))
    if (i + j + 3 * k) % 5 == 0
]


@pytest.mark.parametrize(("name", "cut_name", "implementation"), PAIRS)
def test_explicit_axes_change_nothing(name, cut_name, implementation):
    inputs, held = cut(EXPLICIT, cut_name)
    with jax.set_mesh(EXPLICIT):
        got = derived(CALLS[name], implementation)(inputs, held)
    close(got, on_one_device(name, implementation))
    query = inputs["query"].sharding.spec
    want = P(*(*query, *[None] * 4)[:3], None)
    assert jax.typeof(got[0]).sharding.spec == want
    assert jax.typeof(got[1]).sharding.spec == want
    assert jax.tree.map(jax.typeof, got[2][0]) == jax.tree.map(jax.typeof, inputs)


@pytest.mark.parametrize("name", ["ids", "take", "slopes"])
def test_arrays_that_carry_their_mesh(name):
    """Eagerly, and compiled, without `jax.set_mesh`."""
    inputs, held = cut(EXPLICIT, "both")
    call = lambda inputs, held: jattn.attention(**inputs, **CALLS[name](held))
    want = on_one_device(name, "blockwise")[0]
    for function in (call, jax.jit(call)):
        got = function(inputs, held)
        close(got, want)
        assert got.sharding.spec[:2] == ("y", "x")
    close(call(INPUTS, held), want)  # only what the call holds lies on the mesh
    with jax.set_mesh(EXPLICIT):
        close(call(inputs, held), want)
        close(call(INPUTS, HELD), want)


# Functions that bring numbers of Python, `jit`s and new axes beside what they capture.
WRITTEN = {
    "where": lambda x: {
        "mask": lambda b, n, t, s: jnp.where(t > s, x["ids"][b, t] == x["ids"][b, s], True)
    },
    "select": lambda x: {
        "modifier": lambda logit, b, n, t, s: jnp.select(
            [t > s, t == s], [logit, x["slopes"][n]], 0.5
        )
    },
    "stack": lambda x: {
        "modifier": lambda logit, b, n, t, s: (
            logit + jnp.stack([x["slopes"][n], x["table"][t]])[s % 2]
        )
    },
    "logsumexp": lambda x: {
        "modifier": lambda logit, b, n, t, s: logit - jax.nn.logsumexp(x["bias"][b, n, t])
    },
    "gelu": lambda x: {
        "modifier": lambda logit, b, n, t, s: (
            jax.nn.gelu(logit) + x["slopes"][n] * float(t.ndim)
        )
    },
    "vmap": lambda x: {
        "modifier": lambda logit, b, n, t, s: jax.vmap(
            lambda c: jnp.where(c > 0.2, c * logit, 0.0)
        )(x["slopes"]).sum()
    },
    "grad": lambda x: {
        "modifier": lambda logit, b, n, t, s: jax.grad(
            lambda y: jnp.tanh(y * x["slopes"][n])
        )(logit)
    },
    "after a cap": lambda x: {
        "modifier": modifiers.SoftCap(5.0)
        >> (lambda logit, b, n, t, s: logit + x["slopes"][n])
    },
    "after slopes": lambda x: {
        "modifier": modifiers.ALiBi(x["slopes"])
        >> (lambda logit, b, n, t, s: logit + x["slopes"][n])
    },
}


@pytest.mark.parametrize("name", WRITTEN)
def test_functions_over_arrays_on_explicit_axes(name):
    def loss(slopes, inputs, held):
        return jattn.attention(**inputs, **WRITTEN[name](held | {"slopes": slopes})).sum()

    call = lambda inputs, held: jattn.attention(**inputs, **WRITTEN[name](held))
    slope = jax.jit(jax.grad(loss))
    want, want_slope = jax.jit(call)(INPUTS, HELD), slope(SLOPES, INPUTS, HELD)
    inputs, held = cut(EXPLICIT, "heads")
    with jax.set_mesh(EXPLICIT):
        close(call(inputs, held), want)
        close(jax.jit(call)(inputs, held), want)
        close(slope(held["slopes"], inputs, held), want_slope, 1e-4)


VIEWS = {
    "state": lambda x, o: jattn.attention_state(**x, **o),
    "logits": lambda x, o: jattn.attention_logits(x["query"], x["key"], **o),
    "weights": lambda x, o: jattn.attention_weights(x["query"], x["key"], **o),
    "rows": lambda x, o: jattn.attention_weights(
        x["query"], x["key"], rows=jnp.array([1, 5, 2]), **o
    ),
    "entropy": lambda x, o: jattn.attention_entropy(x["query"], x["key"], **o),
    "received": lambda x, o: jattn.attention_received(x["query"], x["key"], **o),
    "average": lambda x, o: jattn.attention_received(x["query"], x["key"], **o).mean(-1),
    "strongest": lambda x, o: jattn.strongest_keys(x["query"], x["key"], 3, **o),
    "strongest average": lambda x, o: jattn.strongest_keys(
        x["query"], x["key"], 3, average=True, **o
    ),
    "merge": lambda x, o: jattn.merge(
        jattn.attention_state(**x, **o), jattn.EMPTY, jattn.attention_state(**x)
    ),
    "block_table": lambda x, o: jattn.attention(
        **x, mask=jattn.block_table(o["mask"], x["query"], x["key"], block=4)
    ),
    "explain": lambda x, o: jnp.zeros(len(str(jattn.explain(**x, **o))[:0])),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("cut_name", ["both", "uneven heads"])
def test_every_public_function_takes_explicit_axes(view, cut_name):
    def call(inputs, held):
        mask = lambda b, n, t, s: held["ids"][b, t] <= held["ids"][b, s]
        return VIEWS[view](inputs, {"mask": mask})

    inputs, held = cut(EXPLICIT, cut_name)
    want = jax.jit(call)(INPUTS, HELD)
    close(jax.jit(call)(inputs, held), want)
    with jax.set_mesh(EXPLICIT):
        close(jax.jit(call)(inputs, held), want)
    if view in ("logits", "weights", "entropy", "received"):
        finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
        loss = lambda inputs, held: jnp.sum(finite(call(inputs, held)) ** 2)
        want = jax.jit(jax.grad(loss))(INPUTS, HELD)
        with jax.set_mesh(EXPLICIT):
            close(jax.jit(jax.grad(loss))(inputs, held), want)


@pytest.mark.parametrize("spmd", [None, "x"])
def test_vmap_over_an_explicit_axis(spmd):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (INPUTS, HELD))
    call = lambda inputs, held: jattn.attention(**inputs, **CALLS["slopes"](held))
    want = jax.vmap(call)(*stacked)
    put = lambda x: jax.device_put(x, NamedSharding(EXPLICIT, P("x")))
    with jax.set_mesh(EXPLICIT):
        mapped = jax.jit(jax.vmap(call, spmd_axis_name=spmd))
        close(mapped(*jax.tree.map(put, stacked)), want)


def test_one_mesh_with_axes_of_several_kinds():
    """Manual x, explicit y, automatic z."""
    kinds = AxisType.Explicit, AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=kinds)
    specs = {name: P("x", None, "y") for name in INPUTS}
    inputs = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in INPUTS.items()
    }
    ids = jax.device_put(IDS, NamedSharding(mesh, P("x", "y")))
    slopes = jax.device_put(SLOPES, NamedSharding(mesh, P("y")))

    def call(inputs, ids, slopes):
        return jattn.attention(
            **inputs,
            mask=lambda b, n, t, s: ids[b, t] == ids[b, s],
            modifier=lambda logit, b, n, t, s: logit - slopes[n] * far(t, s),
        )

    loss = lambda *x: jnp.sum(call(*x) ** 2)
    want = loss(INPUTS, IDS, SLOPES)
    with jax.set_mesh(mesh):
        part = jax.shard_map(
            lambda *x: lax.psum(loss(*x), "x"),
            in_specs=({name: P("x") for name in INPUTS}, P("x"), P()),
            out_specs=P(),
            axis_names={"x"},
        )
        close(jax.jit(part)(inputs, ids, slopes), want)


def test_an_unknown_way_of_lowering_is_named():
    from jattn.operations import lowering

    for function in (lowering._alone, lowering._is_spread):
        with pytest.raises(TypeError, match="Unknown"):
            function(type("Unknown", (), {})())
