"""Inside `shard_map`, in its default mode, which checks over which axes values differ."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

import jattn
from jattn import masks
from jattn.call.pose import pose
from tests.helpers.meshes import IDS, QUERY, SLOPES, TABLE, P, T, close, far

pytestmark = pytest.mark.slow

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
