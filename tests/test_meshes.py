"""Arrays on several devices: every call equals that of one device, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jattn
from jattn import masks, modifiers
from jattn.call.pose import pose
from jattn.counted import counted_from
from tests.helpers.draws import normal

pytestmark = pytest.mark.slow

P = PartitionSpec
B, T, N, K, H = 4, 8, 4, 2, 8
RNG = jax.random.key(0)
QUERY = normal(1, (B, T, N, H))
KEY, VALUE = (normal(i, (B, T, K, H)) for i in (2, 3))
IDS = jnp.asarray(np.random.default_rng(4).integers(0, 2, (B, T)), jnp.int32)
LENGTHS = jnp.array([3, 8, 7, 1])
SLOPES = jnp.linspace(0.1, 0.5, N)
BIAS = normal(5, (B, N, T, T))
TABLE = normal(6, (2 * T,))
INPUTS = {"query": QUERY, "key": KEY, "value": VALUE}
HELD = {
    "ids": IDS,
    "lengths": LENGTHS,
    "slopes": SLOPES,
    "bias": BIAS,
    "table": TABLE,
    "allowed": BIAS < 0.5,
    "position": jnp.arange(T)[::-1],
}


def far(t, s):
    return jnp.abs(t - s).astype(jnp.float32)


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


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)


EXPLICIT = mesh_of(AxisType.Explicit)


def cut(mesh, name):
    query, key, held = CUTS[name]
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    specs = {"query": query, "key": key, "value": key}
    inputs = {name: put(x, specs[name]) for name, x in INPUTS.items()}
    places = {1: held[0], 2: held[1], 4: held[2]}
    return inputs, {name: put(x, places[x.ndim]) for name, x in HELD.items()}


def close(got, want, bound=2e-5):
    compare = functools.partial(np.testing.assert_allclose, atol=bound, rtol=bound)
    jax.tree.map(compare, jax.device_get(got), jax.device_get(want))


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


# Inside `shard_map`, in its default mode, which checks over which axes values differ.

MANUAL = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))


def sharded(function, count=1):
    spec = P(None, "x")
    return jax.jit(
        jax.shard_map(function, mesh=MANUAL, in_specs=(spec,) * count, out_specs=spec)
    )


def places(form):
    """The positions of a device's queries and keys."""
    first = lax.axis_index("x") * (T // 4)
    position = first if form == "scalar" else first + jnp.arange(T // 4)
    return {"query_position": position, "key_position": position}


LOCAL = {
    "ids": lambda: {"mask": lambda b, n, t, s: IDS[0, t] == IDS[0, s]},
    "search": lambda: {
        "mask": lambda b, n, t, s: (
            jnp.searchsorted(jnp.array([2, 5]), t) >= jnp.searchsorted(jnp.array([3]), s)
        )
    },
    "cond": lambda: {
        "mask": lambda b, n, t, s: lax.cond(t > s, lambda: t % 2 == 0, lambda: s == t)
    },
    "relu": lambda: {
        "modifier": lambda logit, b, n, t, s: logit + jax.nn.relu(TABLE)[t] * TABLE[s]
    },
}
LOCALS = {
    "blockwise": lambda q, o: jattn.attention(q, q, q, implementation="blockwise", **o),
    "dense": lambda q, o: jattn.attention(q, q, q, implementation="dense", **o),
    "weights": lambda q, o: jattn.attention_weights(q, q, **o).sum(-1).swapaxes(1, 2),
    "entropy": lambda q, o: jattn.attention_entropy(q, q, **o),
    "received": lambda q, o: jattn.attention_received(q, q, **o),
    "strongest": lambda q, o: jattn.strongest_keys(q, q, 2, **o).weights,
}


@pytest.mark.parametrize("form", ["scalar", "array"])
@pytest.mark.parametrize("function", LOCALS)
@pytest.mark.parametrize("name", LOCAL)
def test_positions_of_a_device(name, function, form):
    """Each device attends to its own keys, which one device says by a mask."""
    call = LOCALS[function]
    block = lambda b, n, t, s: t // (T // 4) == s // (T // 4)
    alone = LOCAL[name]()
    alone["mask"] = masks.as_mask(alone.get("mask", block)) & block
    local = lambda q: call(q, LOCAL[name]() | places(form))
    close(sharded(local)(QUERY), jax.jit(lambda q: call(q, alone))(QUERY))
    if function in ("blockwise", "dense", "entropy"):
        loss = lambda call: lambda q: jnp.sum(call(q) ** 2)
        hessian = lambda f: jax.jit(lambda q: jax.jvp(jax.grad(f), (q,), (q,)))
        want = hessian(loss(lambda q: call(q, alone)))(QUERY)
        close(hessian(loss(sharded(local)))(QUERY), want, 3e-4)


def test_what_a_mask_captures_may_differ_from_device_to_device():
    """And what it shares gets its gradient from all devices."""

    def call(query, ids, slopes):
        return jattn.attention(
            query,
            query,
            query,
            mask=lambda b, n, t, s: jnp.take(ids[0], t) == ids[0, s],
            modifier=lambda logit, b, n, t, s: logit - slopes[n] * far(t, s),
            implementation="dense",
        )

    def loss(query, slopes):
        part = lambda query, ids: call(query, ids, slopes)
        return jnp.sum(sharded(part, 2)(query, IDS) ** 2)

    def one_by_one(query, slopes):
        cuts = zip(*(jnp.split(x, 4, axis=1) for x in (query, IDS)), strict=True)
        return sum(jnp.sum(call(*x, slopes) ** 2) for x in cuts)

    want = jax.grad(one_by_one, (0, 1))(QUERY, SLOPES)
    close(jax.grad(loss, (0, 1))(QUERY, SLOPES), want)


def test_a_block_table_of_a_device():
    mask = lambda b, n, t, s: IDS[0, t] == IDS[0, s]

    def call(query):
        table = jattn.block_table(mask, query, query, block=2, **places("array"))
        return jattn.attention(query, query, query, mask=table, **places("array"))

    block = lambda b, n, t, s: t // (T // 4) == s // (T // 4)
    both = masks.as_mask(mask) & block
    close(sharded(call)(QUERY), jattn.attention(QUERY, QUERY, QUERY, mask=both))


def test_programs_do_not_know_where_arrays_lie():
    """So calls on a mesh and off it are one program."""
    found = []

    def note(query, ids):
        mask = lambda b, n, t, s: jnp.take(ids[0], t) == ids[0, s]
        options = {"mask": mask, "query_position": 0}
        found.append(pose("test", query, query, query, **options)[0].mask)
        return query

    note(QUERY[:, :2], IDS[:, :2])
    sharded(note, 2)(QUERY, IDS)
    assert found[0] == found[1]
    assert hash(found[0]) == hash(found[1])


@jax.custom_jvp
def scaled_sine(x, y):
    return jnp.sin(x) * y


@scaled_sine.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return scaled_sine(x, y), jnp.cos(x) * y * dx + jnp.sin(x) * dy


@jax.custom_vjp
def product(x, y):
    return x * y


product.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, g: (g * kept[1], g * kept[0]))

# Functions with their own derivatives, or others that JAX traces by themselves, of a
# logit and a number that a device made.
OWN = {
    "relu": lambda x, far: jax.nn.relu(x + far / 8),
    "logaddexp": jnp.logaddexp,
    "gelu": lambda x, far: jax.nn.gelu(x + far / 8),
    "jvp": lambda x, far: scaled_sine(x, far / 8),
    "vjp": lambda x, far: product(x, far / 8),
    "vjp in jit": lambda x, far: jax.jit(product)(x, far / 8),
    "jvp in scan": lambda x, far: lax.scan(
        lambda x, y: (scaled_sine(x, y + far / 8), None), x, jnp.array([0.5, 0.7])
    )[0],
    "solve": lambda x, far: lax.custom_linear_solve(
        lambda y: y * (9 + far / 8), x, lambda _, x: x / (9 + far / 8), symmetric=True
    ),
    "branches": lambda x, far: lax.cond(x > 0, jax.nn.relu, lambda x: x * far / 8, x),
    "grad inside": lambda x, far: jax.grad(lambda x: jax.nn.gelu(x) * far / 8)(x),
    "jvp in remat": lambda x, far: jax.checkpoint(scaled_sine)(x, far / 8),
}


@pytest.mark.parametrize("function", ["blockwise", "dense"])
@pytest.mark.parametrize("name", OWN)
def test_own_derivatives_of_numbers_that_a_device_made(name, function):
    call = LOCALS[function]
    block = lambda b, n, t, s: t // (T // 4) == s // (T // 4)

    def loss(inputs, local):
        def modifier(x, b, n, t, s):
            return OWN[name](x, (t - 3 * s).astype(x.dtype)) * inputs["slopes"][n]

        def part(query):
            options = {"modifier": modifier, "mask": lambda b, n, t, s: t >= s - 2}
            return call(query, options | places("array"))

        if local:
            return jnp.sum(jnp.sin(sharded(part)(inputs["query"])))
        options = {
            "modifier": modifier,
            "mask": block & masks.as_mask(lambda b, n, t, s: t >= s - 2),
        }
        return jnp.sum(jnp.sin(call(inputs["query"], options)))

    inputs = {"query": QUERY, "slopes": SLOPES}
    first = lambda local: jax.grad(functools.partial(loss, local=local))
    squares = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))
    second = lambda local: jax.grad(lambda x: squares(first(local)(x)))
    # A second derivative takes seconds to compile, and its rules are traced alike.
    order = second if function == "dense" else first
    close(jax.jit(order(True))(inputs), jax.jit(order(False))(inputs), 3e-4)


# Masks that ask where they are, so that the call needs no positions.
ASKING = {
    "index": lambda ids: lambda b, n, t, s: s <= t + lax.axis_index("x") * (T // 4),
    "in jit": lambda ids: jax.jit(
        lambda b, n, t, s: jax.jit(lambda t: t + lax.axis_index("x") * (T // 4))(t) >= s
    ),
    "gathered": lambda ids: (
        lambda b, n, t, s: (
            lax.all_gather(ids + 1, "x").reshape(-1)[t + lax.axis_index("x") * (T // 4)] > s
        )
    ),
}


@pytest.mark.parametrize("function", ["blockwise", "dense"])
@pytest.mark.parametrize("name", ASKING)
def test_masks_may_ask_for_the_device(name, function):
    def loss(query, mask, place):
        call = lambda query, ids: jattn.attention(
            query,
            QUERY,
            QUERY,
            mask=mask(ids),
            modifier=lambda x, b, n, t, s: jax.nn.gelu(x + 0.1 * place()),
            implementation=function,
        )
        cuts = P(None, "x"), P("x")
        if mask is ASKING[name]:
            call = jax.shard_map(call, mesh=MANUAL, in_specs=cuts, out_specs=cuts[0])
        return jnp.sum(jnp.sin(call(query, jnp.arange(T))))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    alone = lambda ids: masks.Causal()
    want = gradient(QUERY, alone, lambda: jnp.float32(1))
    # A quarter of each of four devices.
    got = gradient(QUERY, ASKING[name], lambda: lax.psum(jnp.float32(0.25), "x"))
    close(got, want)


# Examples and heads of a device, counted as in the whole.

COUNTED = {
    "lengths[b]": {"mask": lambda b, n, t, s: s < LENGTHS[b]},
    "Lengths": {"mask": masks.Lengths(LENGTHS)},
    "both": {"mask": masks.Causal() & (lambda b, n, t, s: (s < LENGTHS[b]) | (n == 1))},
    "array": {"mask": BIAS < 0.5},
    "slopes[n]": {"modifier": lambda x, b, n, t, s: x - SLOPES[n] * far(t, s)},
    "ALiBi()": {"modifier": modifiers.ALiBi()},
    "RelativeBias": {
        "modifier": modifiers.RelativeBias(BIAS[0, :, 0, :7]) >> modifiers.SoftCap(3.0)
    },
    "dropout": {"dropout": jattn.Dropout(0.5, RNG)},
    "shared dropout": {"dropout": jattn.Dropout(0.5, RNG, shared=True)},
}


@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
@pytest.mark.parametrize("name", COUNTED)
def test_examples_and_heads_can_be_counted_as_in_the_whole(name, implementation):
    mesh = mesh_of(AxisType.Auto)
    named = isinstance(next(iter(COUNTED[name].values())), masks.Mask | modifiers.Modifier)
    whole = {"B": B, "N": N} if named or name == "array" else {}

    def call(inputs, counts):
        options = {
            key: counted_from(rule, **counts) if counts else rule
            for key, rule in COUNTED[name].items()
        }
        return jattn.attention(**inputs, **options, implementation=implementation)

    def part(inputs):
        b, n = lax.axis_index("x") * (B // 2), lax.axis_index("y") * (N // 2)
        return call(inputs, {"b": b, "n": n, **whole})

    spec = P("x", None, "y")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)
    loss = lambda f: lambda inputs: jnp.sum(f(inputs) ** 2)
    want = jax.jit(jax.value_and_grad(loss(lambda x: call(x, {}))))(INPUTS)
    close(jax.jit(jax.value_and_grad(loss(mapped)))(INPUTS), want)


def test_counting_needs_a_rule():
    with pytest.raises(ValueError, match="got the class Causal; call it"):
        counted_from(masks.Causal)
    for kind in ("mask", "modifier"):
        given = {kind: counted_from(lambda t, s: t >= s)}
        with pytest.raises(ValueError, match=r"`rule` must be a function of .*, got one"):
            jattn.attention(QUERY, QUERY, QUERY, **given)
    query = QUERY.reshape(2, 2, T, N, H)
    counted = counted_from(masks.Lengths(LENGTHS), B=B)
    with pytest.raises(ValueError, match="one batch axis"):
        jattn.attention(query, query, query, mask=counted)


def test_what_is_counted_lies_within_the_whole():
    query = QUERY[:2]
    attend = lambda **rule: jattn.attention(query, query, query, **rule)
    for b, count in ((B - 1, B), (-1, B), (0, 1), (jnp.int32(B), B)):
        counted = counted_from(masks.Lengths(LENGTHS), b=b, B=count)
        with pytest.raises(ValueError, match="`B` must count all of the whole call"):
            attend(mask=counted)
    traced = lambda n: attend(modifier=counted_from(modifiers.ALiBi(), n=n, N=N - 1))
    with pytest.raises(ValueError, match=r"`N` must count all .* for a part of"):
        jax.jit(traced)(0)
    for count in (True, 4.0, "a", -1):
        with pytest.raises(ValueError, match="counted_from: `N` must be a whole number"):
            counted_from(modifiers.ALiBi(), N=count)
    with pytest.raises(ValueError, match="`b` must be one whole number, got shape"):
        counted_from(masks.Causal(), b=jnp.arange(2))


def test_an_unknown_way_of_lowering_is_named():
    from jattn.operations import lowering

    for function in (lowering._alone, lowering._is_spread):
        with pytest.raises(TypeError, match="Unknown"):
            function(type("Unknown", (), {})())
