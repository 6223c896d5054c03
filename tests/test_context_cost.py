"""What a call on many devices moves and holds, as compiled; and who does how much."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import Context, balanced, masks
from jattn.call.pose import pose
from jattn.context.choose import MEMORY
from jattn.context.turns import turns
from tests.helpers.draws import normal

DEVICES, T, N, K, H = 8, 1024, 8, 8, 16
MESH = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
CAUSAL = masks.Causal()
KINDS = "all-to-all|all-gather|reduce-scatter|collective-permute"


def shapes(length=T, mesh=MESH):
    place = NamedSharding(mesh, P(None, "x"))
    make = lambda heads: jax.ShapeDtypeStruct(
        (1, length, heads, H), "float32", sharding=place
    )
    return make(N), make(K), make(K)


def compiled(function, *inputs):
    return jax.jit(function).lower(*inputs).compile()


def loss(strategy=None, mesh=MESH, mask=CAUSAL):
    context = Context("x", strategy=strategy, mesh=mesh)

    def total(query, key, value):
        return jnp.sum(jattn.attention(query, key, value, mask=mask, context=context) ** 2)

    return total


def gradients(*args, **options):
    return jax.grad(loss(*args, **options), (0, 1, 2))


def collectives(program):
    """Of each collective of floating numbers: its kind, bytes received, if in a loop."""
    found = []
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)
        if match is None:
            continue
        numbers = [
            math.prod(map(int, sizes.split(",")))
            for sizes in re.findall(r"f32\[([\d,]+)\]", match[1])
        ]
        if numbers:
            found.append((match[2], 4 * sum(numbers), "while/body" in line))
    return found


def received(program, count):
    """Bytes that a device receives, of floating numbers; loops run `count` turns."""
    total = 0
    for kind, size, in_loop in collectives(program):
        if kind == "collective-permute":
            total += size * (count if in_loop else 1)
        elif kind == "reduce-scatter":
            total += size * (DEVICES - 1)
        else:
            total += size * (DEVICES - 1) // DEVICES
    return total


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "exchange"])
@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & masks.Window(100, 0)])
def test_explain_says_what_the_program_moves(strategy, mask):
    context = Context("x", strategy=strategy, mesh=MESH)
    told = jattn.explain(*shapes(), mask=mask, context=context).devices
    forward = compiled(loss(strategy, mask=mask), *shapes())
    assert received(forward, told.turns) == told.forward
    both = compiled(gradients(strategy, mask=mask), *shapes())
    moved = received(both, told.turns)
    if strategy == "gather":  # XLA:CPU drops the barrier that keeps it from sharing these
        assert moved in (told.backward, told.forward + told.backward)
    else:
        assert moved == told.forward + told.backward


@pytest.mark.slow
def test_ring_gathers_nothing_and_does_not_grow():
    """As many permutes on 2 devices as on 8, and memory that falls as 1 / devices."""
    counts, held = [], []
    for devices in (2, 4, 8):
        mesh = jax.make_mesh(
            (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        program = compiled(gradients("ring", mesh), *shapes(2**15, mesh))
        found = collectives(program)
        assert {kind for kind, *_ in found} == {"collective-permute"}
        counts.append(len(found))
        held.append(program.memory_analysis().temp_size_in_bytes)
    assert counts == [8, 8, 8]  # forward K, V; backward these, their cotangents, and home
    assert held[1] < 0.7 * held[0]
    assert held[2] < 0.7 * held[1]


def count_turns(mask, length=64, **options):
    make = lambda heads: jnp.zeros((1, length, heads, 4))
    problem, operands = pose("test", make(2), make(1), make(1), mask=mask, **options)
    return turns(problem, operands, DEVICES)


def test_turns_that_the_mask_leaves_empty_are_not_run():
    assert count_turns(None) == DEVICES
    assert count_turns(CAUSAL) == DEVICES
    assert count_turns(CAUSAL & masks.Window(7, 0)) == 2  # of one shard: a halo
    assert count_turns(CAUSAL & masks.Window(9, 0)) == 3
    assert count_turns(masks.Window(0, 0)) == 1
    assert count_turns(masks.Window(0, 1)) == DEVICES  # the next device's come last
    order = balanced(64, DEVICES)
    window = CAUSAL & masks.Window(7, 0)
    assert count_turns(window, query_position=order, key_position=order) == DEVICES


@pytest.mark.slow
def test_traced_ids_bound_the_turns_in_one_compilation():
    context = Context("x", strategy="ring", mesh=MESH)
    inputs = [normal(i, (1, 64, heads, 4)) for i, heads in enumerate((2, 1, 1))]

    def both(ids, *inputs, **options):
        mask = lambda b, n, t, s: (t >= s) & (ids[t] == ids[s])
        attend = functools.partial(jattn.attention, mask=mask, **options)
        output, pull = jax.vjp(attend, *inputs)
        return output, pull(jnp.cos(output))

    many = jax.jit(functools.partial(both, context=context))
    for size, want in ((8, 1), (16, 2), (24, 3), (64, 8)):
        ids = jnp.arange(64) // size
        found = count_turns(lambda b, n, t, s, ids=ids: (t >= s) & (ids[t] == ids[s]))
        assert int(found) == want
        got = jax.device_get(many(ids, *inputs))
        close = functools.partial(np.testing.assert_allclose, atol=2e-6)
        jax.tree.map(close, got, jax.device_get(both(ids, *inputs)))
    assert many._cache_size() == 1


def documents(length, count=24):
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
    ids = jnp.asarray(np.searchsorted(cuts, np.arange(length), side="right"), jnp.int32)
    return lambda b, n, t, s: (t >= s) & (ids[t] == ids[s])


def work(mask, order=None, length=16384):
    make = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 64), "float32")
    context = Context("x", strategy="ring", mesh=MESH)
    where = {} if order is None else {"query_position": order, "key_position": order}
    told = jattn.explain(make(2), make(1), make(1), mask=mask, context=context, **where)
    return told.devices.work


def test_balanced_work():
    assert work(CAUSAL) > 1.8
    assert work(CAUSAL, balanced(16384, DEVICES)) < 1.01
    mask = documents(16384)
    assert work(mask) > 2
    assert work(mask, balanced(16384, DEVICES, mask)) <= 1.05
    table = jattn.block_table(
        mask,
        jax.ShapeDtypeStruct((16384, 1, 8), "float32"),
        jax.ShapeDtypeStruct((16384, 1, 8), "float32"),
    )
    np.testing.assert_array_equal(
        balanced(16384, DEVICES, table), balanced(16384, DEVICES, mask)
    )


@pytest.mark.parametrize(("length", "devices"), [(8, 2), (24, 3), (24, 8), (7, 7)])
@pytest.mark.parametrize("mask", [None, CAUSAL, documents(24, 3)])
def test_balanced_is_a_permutation(length, devices, mask):
    order = balanced(length, devices, mask, 2)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    assert order.dtype == jnp.int32


def test_balanced_is_traced_too():
    mask = documents(1024, 5)
    want = balanced(1024, 4, mask, 32)
    ids = jnp.zeros(1024, jnp.int32).at[500:].set(1)
    make = lambda ids: balanced(1024, 4, lambda b, n, t, s: ids[t] == ids[s], 32)
    np.testing.assert_array_equal(jax.jit(make)(ids), make(ids))
    assert want.shape == (1024,)


def test_choice_follows_the_table(monkeypatch):
    chosen = lambda **options: (
        jattn.explain(
            *shapes(options.pop("length", T)), context=Context("x", mesh=MESH), **options
        ).devices.strategy
    )
    assert chosen(mask=CAUSAL & masks.Window(100, 0)) == "ring"
    assert chosen(mask=CAUSAL) == "exchange"  # N = K = 8: it moves less
    monkeypatch.setitem(MEMORY, "cpu", 1e6)  # whole keys do not fit
    assert chosen(mask=CAUSAL) == "ring"
    query, *keys = shapes()
    query = jax.ShapeDtypeStruct((1, 1, N, H), "float32")
    told = jattn.explain(query, *keys, context=Context("x", mesh=MESH))
    assert told.devices.strategy == "merge"
    assert "needs queries on every device" in str(told)


@pytest.mark.parametrize(
    ("context", "length", "options", "message"),
    [
        ({"axis": "y"}, 64, {}, "names the mesh axis 'y', but the mesh has 'x'"),
        ({}, 60, {}, "which must divide S=60; pad to 64, and hide the rest with `masks.L"),
        ({"strategy": "exchange"}, 64, {}, 'needs N=2 query heads .* use "ring" or "gat'),
        ({"strategy": "ring"}, 64, {"implementation": "dense"}, "parts share"),
        ({"batch": "x"}, 64, {}, "axis 'x' carries batch and cannot carry T and S too"),
        ({"strategy": "tree"}, 64, {}, "`strategy` must be None or one of"),
        ({"mesh": None}, 64, {}, "needs a mesh, and there is none here"),
    ],
)
def test_refusals(context, length, options, message):
    query = jnp.zeros((1, length, 2, 4))

    def call():
        made = Context(**{"axis": "x", "mesh": MESH} | context)
        return jattn.attention(query, query, query, context=made, **options)

    with pytest.raises(ValueError, match=message):
        call()


def test_explain_says_what_xla_gathers():
    assert "XLA gathers it" in str(jattn.explain(*shapes()))
    assert "Context('x')" in str(jattn.explain(*shapes()))
