"""Gradients in half precision: a sum of several parts is rounded once, not each part.

The parts may come from several devices, from slices of a `vmap`, or from the two halves of
a prompt. Here all keys have a common offset. So the gradients of the query that come from
single parts are large, and mostly cancel: rounded before they are added up, they would
leave little but their roundings.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches, definition
from jattn.implementations import attention as operation
from jattn.masks import Causal
from jattn.operations import mapped
from tests.helpers.draws import normal

NAMES = "query", "key", "value"
T, N, K, H, OFFSET = 64, 8, 2, 16, 16.0
MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def drawn(dtype, *before, T=T, S=T):
    """A query, keys, values and weights of the output, with axes before theirs."""
    shapes = {"query": (T, N, H), "key": (S, K, H), "value": (S, K, H), "weight": (T, N, H)}
    found = {x: normal(i, (*before, *y)) for i, (x, y) in enumerate(shapes.items())}
    found["key"] = found["key"] + OFFSET
    return {name: x.astype(dtype) for name, x in found.items()}


def gradients(attend, given, shared=()):
    """The gradients of a weighted sum of the output; `shared` are used whole by each."""

    def total(arrays):
        one = lambda arrays: attend(*(arrays[name] for name in NAMES))
        axes = ({name: None if name in shared else 0 for name in arrays},)
        output = jax.vmap(one, axes)(arrays) if shared else one(arrays)
        return jnp.sum((output * given["weight"].astype(output.dtype)).astype(float))

    found = jax.jit(jax.grad(total))({name: given[name] for name in NAMES})
    return {name: np.asarray(x).astype(np.float64) for name, x in found.items()}


def exactly(attend, given, **options):
    with jax.enable_x64(True):
        wide = {
            name: jnp.asarray(np.float64(x.astype("float32"))) for name, x in given.items()
        }
        return gradients(attend, wide, **options)


def assert_rounded_once(got, want, dtype, each=True):
    """Each number by itself, but for what float32 leaves of sums that cancel."""
    for name, x in want.items():
        error = np.abs(got[name] - x)
        size = np.abs(x) if each else np.max(np.abs(x))
        rounding = float(jnp.finfo(dtype).eps) * size
        assert np.max(error - rounding) <= 1e-4 * np.max(np.abs(x)), name


OPTIONS = {
    "plain": {},
    "causal": {"mask": Causal()},
    "rows that see nothing": {"mask": Causal(-3)},
    "modifier": {"modifier": lambda x, b, n, t, s: 30 * jnp.tanh(x / 30)},
}


@pytest.mark.parametrize("name", [*OPTIONS, "logsumexp"])
@pytest.mark.parametrize("where", ["CPU", "GPU"])
def test_rounded_weights(where, name, monkeypatch):
    """Checks gradients of a query whose keys are all near 16, where weights are rounded.

    They are so in forward, as where the processor multiplies bfloat16; on a GPU their
    cotangents are rounded too. What keys have in common must not multiply these errors.
    """
    on = operation.Attention.on
    if where == "GPU":
        narrow = lambda self, _: dataclasses.replace(on(self, "cuda"), kernel=None)
        monkeypatch.setattr(operation.Attention, "on", narrow)
    monkeypatch.setattr(operation, "multiplies_bfloat16", lambda: True)
    jax.clear_caches()
    given, options = drawn("bfloat16", 1), OPTIONS.get(name, {})

    def attended(module, **named):
        if name != "logsumexp":
            return lambda *x: module.attention(*x, **options, **named).astype(float)
        state = lambda *x: module.attention_state(*x, **named)
        return lambda *x: state(*x).output.astype(float) + state(*x).logsumexp[..., None]

    want = exactly(attended(definition), given)["query"]
    got = gradients(attended(jattn, implementation="blockwise"), given)["query"]
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    # A modifier changes the sum of a row, so on a GPU the error stays.
    most = 4 if (where, name) == ("GPU", "modifier") else 1
    assert error <= most * float(jnp.finfo("bfloat16").eps)
    jax.clear_caches()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("where", ["many", "few", "dropout"])
def test_rounded_weights_of_values_with_an_offset(where, name, monkeypatch):
    """Checks gradients where all values are near 16 and weights do not add up to 1."""
    monkeypatch.setattr(operation, "multiplies_bfloat16", lambda: True)
    jax.clear_caches()
    given = drawn("bfloat16", 1, **({"T": 2, "S": 1024} if where == "few" else {}))
    if where != "few":  # whose gradients of the query show it if keys are near 16 as well
        given["key"] = given["key"] - OFFSET
    given["value"] = given["value"] + OFFSET
    options = OPTIONS[name]
    if where == "few":
        options = options | {"query_position": 1000}
    if where == "dropout":
        options = options | {"dropout": jattn.Dropout(0.1, jax.random.key(0))}
    attend = lambda *x: jattn.attention(*x, **options, implementation="blockwise")
    want = exactly(lambda *x: definition.attention(*x, **options), given)
    got = gradients(attend, given)
    for x in NAMES:
        error = np.max(np.abs(got[x] - want[x])) / np.max(np.abs(want[x]))
        assert error <= float(jnp.finfo("bfloat16").eps)
    jax.clear_caches()


@pytest.mark.parametrize("sizes", [(2, 12), (16, 12), (64, 2)])
def test_rows_of_one_key_with_rounded_weights(sizes, monkeypatch):
    """Checks sharp rows of few keys, and of values with an offset of their own size.

    The output is that key's value to the last digit, or large keys multiply the rest.
    """
    monkeypatch.setattr(operation, "multiplies_bfloat16", lambda: True)
    jax.clear_caches()
    queries, keys = sizes
    for offset in (0, 1.5):
        given = drawn("bfloat16", 8, T=queries, S=keys)
        given = {name: x[..., :12] for name, x in given.items()}  # a scale that rounds
        given["key"] = 1000 * (given["key"] - OFFSET)
        given["value"] = given["value"] + jnp.bfloat16(offset)
        want = exactly(definition.attention, given)
        errors = {}
        for way in ("dense", "blockwise"):
            attend = functools.partial(jattn.attention, implementation=way)
            got = gradients(attend, given)
            errors[way] = [np.max(np.abs(got[x] - want[x])) for x in NAMES]
        for got, dense in zip(errors["blockwise"], errors["dense"], strict=True):
            assert got <= 1.5 * dense + 2e-3
    jax.clear_caches()


@dtypes
@pytest.mark.parametrize("strategy", ["ring", "gather", "exchange", "merge"])
def test_devices(strategy, dtype):
    given = drawn(dtype, 1)
    context = jattn.Context("x", strategy=strategy)
    with jax.set_mesh(MESH):
        got = gradients(lambda *x: jattn.attention(*x, context=context), given)
    # An exchange copies 2 key heads for 8 devices, and each copy's cotangent is rounded.
    each = strategy != "exchange"
    assert_rounded_once(got, exactly(definition.attention, given), dtype, each)


@dtypes
@pytest.mark.parametrize("budget", [1, mapped.BUDGET])
@pytest.mark.parametrize("shared", [("query",), ("key",), ("key", "value"), ("value",)])
def test_slices(shared, budget, dtype, monkeypatch):
    monkeypatch.setattr(mapped, "BUDGET", budget)  # 1: one slice after the other
    jax.clear_caches()
    given = drawn(dtype, 600, T=4, S=8)
    given |= {name: given[name][0] for name in shared}
    # All slices alike push the sum in one direction: 256 + 1 would be 256 in bfloat16.
    given["weight"] = abs(given["weight"])
    with jax.default_matmul_precision("highest"):  # weights that are not rounded either
        got = gradients(jattn.attention, given, shared)
    want = exactly(definition.attention, given, shared=shared)
    assert_rounded_once(got, want, dtype)
    jax.clear_caches()


@dtypes
def test_the_prompt_of_a_rolling_cache(dtype):
    """Its queries see the slots as they were, and each other: two operations."""
    window, sinks = 24, 4
    near = lambda b, n, t, s: (t >= s) & ((t - s < window) | (s < sinks))
    given = drawn(dtype, 1, S=2 * T)

    def extend(query, key, value):
        kv = caches.rolling(1, window, K, H, sinks=sinks, dtype=dtype)
        kv = kv.append(key[:, :T], value[:, :T])
        return kv.extend(query, key[:, T:], value[:, T:])[0]

    exact = lambda *x: definition.attention(*x, mask=near, query_position=T)
    assert_rounded_once(gradients(extend, given), exactly(exact, given), dtype)


@dtypes
@pytest.mark.parametrize("stored", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("way", ["attend", "dense", "blockwise", "rolling", "tokens"])
def test_vectors_with_scales_are_not_rounded_again(way, stored, dtype):
    """Large logits show each rounding of a key."""
    given, near = drawn(dtype, 1), jattn.masks.Causal()
    query, key, value = (given[name] for name in NAMES)
    options = {"mask": near, "scale": 4.0}
    kv = caches.empty(1, T, K, H, dtype=stored).append(key, value)
    if way == "rolling":
        got, _ = caches.rolling(1, T, K, H, dtype=stored).extend(
            query, key, value, **options
        )
    elif way == "tokens":
        pages = caches.paged(4, 16, K, H, batch_size=1, max_pages=4, dtype=stored)
        at = jnp.zeros(T, jnp.int32), jnp.arange(T)
        got = pages.append(key, value).attend_tokens(query[0], *at, **options)[None]
    else:
        named = None if way == "attend" else way
        got = kv.attend(query, implementation=named, **options)
    assert got.dtype == dtype
    with jax.enable_x64(True):
        exact = kv.dequantize("float64")
        query = jnp.asarray(np.float64(query.astype("float32")))
        want = np.asarray(definition.attention(query, exact.key, exact.value, **options))
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    rounding = float(jnp.finfo(dtype).eps) * np.abs(want)
    # Products of 16 numbers near 16, so logits near 10³, which float32 holds to 6e-5.
    assert np.max(error - rounding) <= 1e-3 * np.max(np.abs(want))
