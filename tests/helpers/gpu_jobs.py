"""What tests of the kernels for NVIDIA GPUs run in a process of their own."""

import dataclasses
import functools
import importlib
import inspect
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from jattn import definition, testing
from jattn.arrays.shapes import Sizes
from jattn.call.pose import pose
from jattn.implementations.gpu.refusal import HOPPER
from jattn.masks import Causal, Lengths, Segments, Window
from jattn.testing.cases import cast
from tests.helpers import emulated_gpu

AMPERE = "8.0"
NAMED = {case.name: case for case in testing.CASES}
# Several blocks of queries and of keys, the last ones not full; H and D need padding.
SIZES = Sizes(batch=(1,), T=150, S=280, N=2, K=1, H=16, D=8)


def strict():
    """Makes JAX as strict as `conftest.py` does.

    The emulator runs inside a callback, which holds one thread of the CPU client, and it
    waits for programs that need another one. With a thread for each of 2 cores it may wait
    for ever; for each device that is asked for there is one more.
    """
    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("error", DeprecationWarning)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)


def matches_definition(name: str, dtype: str, capability: str = HOPPER):
    """Output, logsumexp, every gradient and tangent of a case, within the error budget."""
    attend = functools.partial(emulated_gpu.attention_state, capability=capability)
    testing.assert_matches_definition(attend, NAMED[name], dtype)


def output_matches(name: str, dtype: str, capability: str = HOPPER):
    """Output and logsumexp of a case against the definition in float64."""
    case = NAMED.get(name) or SEVERAL[name]
    inputs = testing.random_inputs(case, dtype)
    attend = functools.partial(emulated_gpu.attention_state, capability=capability)
    got = case.call(attend, inputs)
    with jax.enable_x64(True):
        want = case.call(definition.attention_state, _wide(inputs))
    assert_near(got.output, want.output, 2 * jnp.finfo(dtype).eps, name)
    # Each block of keys rescales the sum, and the largest heads have blocks of 16 on Ada:
    # an error of 2.6 eps was seen for 13 of them.
    assert_near(got.logsumexp, want.logsumexp, 4 * jnp.finfo("float32").eps, name)


def refused(name: str, dtype: str) -> str | None:
    """The sentence with which the kernels refuse a case."""
    case = NAMED[name]
    inputs = testing.random_inputs(case, dtype)
    options = case.options(inputs)
    options.pop("sink", None)
    arrays = (inputs[x] for x in ("query", "key", "value"))
    problem, _ = pose("test", *arrays, **options)
    return emulated_gpu.kernel().refusal(problem, "cpu")


def assert_near(got, want, eps, where):
    """Asserts an error of at most `eps` of the largest number, and equal infinities."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=where)
    finite = np.isfinite(want)
    got, want = (np.where(finite, x, 0) for x in (got, want))
    largest, error = np.max(np.abs(want), initial=1), np.max(np.abs(got - want), initial=0)
    assert error <= float(eps) * largest, (where, error, largest)


def _wide(inputs):
    return jax.tree.map(
        lambda x: cast(np.asarray(x), "float64") if _is_floating(x) else x, inputs
    )


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def several(options=lambda x: {}, extra=None, **different):
    sizes = dataclasses.replace(SIZES, **different)
    return testing.Case("several", options, extra or {}, sizes)


def normal(*letters):
    return lambda sizes, rng: rng.standard_normal([getattr(sizes, x) for x in letters])


def ids(letter):
    return NAMED["segments_with_padding"].extra[{"T": "query_ids", "S": "key_ids"}[letter]]


def bent(x):
    """A modifier that reads an array of queries, one of keys, one of heads and a number."""
    rows, columns, heads, cap = x["rows"], x["columns"], x["heads"], x["cap"]

    def modifier(logit, b, n, t, s):
        bent = cap * jnp.tanh(logit * (1 + rows[t] / 4) / cap) + jnp.log1p(columns[s] ** 2)
        return bent - jnp.abs(heads[n]) * jnp.abs(t - s).astype(logit.dtype) / 50

    return {"modifier": modifier, "mask": Causal(100)}


LOWEST = float(jnp.finfo("bfloat16").min)


def lowest(x):
    """Hides pairs as other libraries do it: by the lowest number, of whole rows too."""
    hide = lambda logit, b, n, t, s: jnp.where(t < 10, LOWEST, logit)
    return {"bias": x["bias"], "modifier": hide}


SEVERAL = {
    "plain": several(),
    "hidden by the lowest number": several(
        lowest, {"bias": lambda sizes, _: np.where(np.arange(sizes.S) < 130, LOWEST, 0.5)}
    ),
    # Its derivative at 0 is NaN, and padded queries have products of 0.
    "no number at padding": several(
        lambda x: {"modifier": lambda logit, b, n, t, s: jnp.sqrt(logit**2)}
    ),
    "large logits": several(lambda x: {"scale": x["scale"]}, {"scale": lambda *_: 3e4}),
    "logits in powers of 2": several(
        lambda x: {"scale": x["scale"]}, {"scale": lambda *_: 2.0**12}
    ),
    "causal": several(lambda x: {"mask": Causal(40)}),
    "window with empty blocks": several(lambda x: {"mask": Window(20, 0)}, S=150),
    "rows that see nothing": several(lambda x: {"mask": Causal(-40)}),
    "segments": several(
        lambda x: {"mask": Segments(x["query_ids"], x["key_ids"], padding_id=0)},
        {"query_ids": ids("T"), "key_ids": ids("S")},
    ),
    "lengths": several(
        lambda x: {"mask": Lengths(x["key_lengths"], x["query_lengths"])},
        NAMED["lengths"].extra,
        batch=(2,),
    ),
    "bent": several(
        bent,
        {
            "rows": normal("T"),
            "columns": normal("S"),
            "heads": normal("N"),
            "cap": lambda sizes, rng: np.asarray(3.0),
        },
    ),
    "bias per key": several(lambda x: {"bias": x["bias"]}, {"bias": normal("S")}),
    "dropout": several(NAMED["dropout"].options),
    "negative scale": several(lambda x: {"scale": x["scale"]}, {"scale": lambda *_: -0.3}),
    "ample heads": several(lambda x: {"mask": Causal(40)}, H=100, D=120, S=200),
    "large heads": several(lambda x: {"mask": Causal(40)}, H=200, D=130, S=200),
    "wide values": several(
        lambda x: {"modifier": jattn.modifiers.SoftCap(3.0)}, H=70, D=140, S=200, N=1
    ),
}


def kernels_match(name: str, dtype: str, capability: str = HOPPER):
    """By the kernels alone: output, logsumexp and every gradient of several blocks."""
    case = SEVERAL[name]
    inputs = testing.random_inputs(case, dtype)
    keep = lambda x: x if x.ndim > 1 else x.astype(jnp.float32)
    extra = {x: keep(inputs[x]) if _is_floating(inputs[x]) else inputs[x] for x in inputs}

    def derived(attend, inputs):
        floating = {k: x for k, x in inputs.items() if _is_floating(x)}
        state, pull = jax.vjp(lambda xs: case.call(attend, inputs | xs), floating)
        like = lambda x: jnp.where(jnp.isfinite(x), jnp.asarray(x), 0)
        return {"state": state, "gradients": pull(jax.tree.map(like, state))[0]}

    attend = functools.partial(emulated_gpu.kernels, capability=capability)
    got = derived(attend, extra)
    with jax.enable_x64(True):
        want = derived(definition.attention_state, _wide(extra))
    both = zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True)
    for (where, x), (_, y) in both:
        exact = "logsumexp" in jax.tree_util.keystr(where)
        eps = 2 * jnp.finfo("float32").eps if exact else 3 * jnp.finfo(dtype).eps
        assert_near(x, y, eps, jax.tree_util.keystr(where))


def small_cotangents_and_large():
    """float16 holds the cotangents of logits, whatever those of the outputs are."""
    query, key, value = (
        jnp.asarray(np.random.default_rng(i).standard_normal((1, 9, 1, 8)), "float16")
        for i in range(3)
    )

    def total(attend, small, large, query, key, value):
        output, logsumexp = attend(query, key, value)
        return small * jnp.sum(output.astype("float32")) + large * jnp.sum(logsumexp)

    for small, large, grown in ((1e-6, 1.0, 1), (0.0, 1e3, 1), (1.0, 0.0, 2e3)):
        arrays = query, key, value * grown
        gradient = jax.grad(total, argnums=(3, 4, 5))
        got = gradient(emulated_gpu.kernels, small, large, *arrays)
        wide = (x.astype("float32") for x in arrays)
        want = gradient(definition.attention_state, small, large, *wide)
        for x, y in zip(got, want, strict=True):
            assert_near(x, y, 5 * jnp.finfo("float16").eps, (small, large, grown))


def _errors(attend, arrays, total, dtype):
    """Errors of the gradients of `total(state, *arrays)`, of the largest number of each.

    The definition has the same numbers in float64.
    """
    of = lambda attend: lambda xs: total(attend(*xs), *xs)
    got = jax.grad(of(attend))(arrays)
    with jax.enable_x64(True):
        want = jax.grad(of(definition.attention_state))(_wide(arrays))
    got, want = ([np.asarray(x).astype(np.float64) for x in xs] for xs in (got, want))
    assert all(np.all(np.isfinite(x)) for x in got)
    pairs = zip(got, want, strict=True)
    return [np.max(abs(x - y)) / np.max(abs(y)) / jnp.finfo(dtype).eps for x, y in pairs]


def small_cotangents_of_logits():
    """float16 holds the cotangents of logits where the values or the loss are small."""
    draw = lambda i: np.random.default_rng(i).standard_normal((1, 300, 1, 8))
    query, key, value = (jnp.asarray(draw(i), "float16") for i in range(3))
    query, weights = query[:, :9], draw(3)[:, :9]
    by = emulated_gpu.kernels
    cases = (  # factors of the output and of the logsumexp in the loss, and of the values
        (64.0, 0.0, 2.0**-10),
        (0.0, 1e-5, 1.0),
        (1e-8, 1e-4, 1e-3),
        (1e-37, 1.0, 1.0),
    )
    for small, large, size in cases:

        def total(state, *xs, small=small, large=large):
            output = state.output.astype(state.logsumexp.dtype)
            found = jnp.sum(output * jnp.asarray(weights, output.dtype))
            return small * found + large * jnp.sum(state.logsumexp)

        # Large keys, and small queries: so gradients of queries are not rounded to 0.
        arrays = query / 64, key * 64, value * size
        d_query, *_ = _errors(by, arrays, total, "float16")
        assert d_query <= 2, (small, large, size, d_query)

    # A sink leaves an output of 1e-38, and the cotangent of the output is as small.
    total = lambda state, *xs: jnp.sum(state.output.astype("float32"))
    sunk = functools.partial(by, sink=jnp.full(1, 90.0))
    both = lambda state, *xs: total(state, *xs) + 1000 * jnp.sum(state.logsumexp)
    gradients = jax.grad(lambda xs: both(sunk(*xs)))((query, key, value))
    assert all(np.all(np.isfinite(x)) for x in gradients)
    assert np.max(abs(gradients[0])) > 1


def weights_near_one():
    """A row whose first key has nearly all the weight keeps the gradients of the other.

    The scale is no power of 2, so the sums are those of other logits than the maximum.
    """
    scale, logits, gaps = 0.3, (30, 100, 1e3, 1e4, 1e6), (12, 10.5, 8, 6, 1.5)
    count = len(logits)
    query = jnp.ones((count, 1, 1, 2), "bfloat16")
    key = np.zeros((count, 2, 1, 2))
    key[:, :, 0, 0] = np.asarray(logits)[:, None] / scale
    key[:, 1, 0, 1] = -np.asarray(gaps) / scale
    key = jnp.asarray(key, "bfloat16")
    value = jnp.broadcast_to(jnp.eye(2, dtype="bfloat16")[:, None], (count, 2, 1, 2))

    def gradient(attend, key, *others):
        total = lambda key: jnp.sum(
            attend(others[0], key, others[1], scale=scale).output[..., 1].astype("float32")
        )
        return np.asarray(jax.grad(total)(key)).astype(np.float64)

    got = gradient(emulated_gpu.kernels, key, query, value)
    with jax.enable_x64(True):
        want = gradient(definition.attention_state, *_wide((key, query, value)))
    eps = float(jnp.finfo("bfloat16").eps)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=2 * eps)


def small_values_of_keys_with_all_the_weight():
    """A key whose weight rounds to 1 has its slope where its value is far below others."""
    query, key = np.zeros((1, 16, 1, 16)), np.zeros((1, 24, 1, 16))
    value = 4096 * np.random.default_rng(0).standard_normal((1, 24, 1, 8))
    query[..., 0], value[0, 5] = 1, 0
    # Two other keys have weights of e⁻¹⁸ = 1.5e-8, and a sum of 1 has no room for them.
    key[..., 0], key[0, 5, 0, 0], key[0, 7:9, 0, 0] = -99, 18, 0

    def gradient(attend, arrays):
        total = lambda xs: jnp.sum(attend(*xs, scale=1.0).output.astype("float32"))
        return [np.asarray(x).astype(np.float64) for x in jax.grad(total)(arrays)]

    arrays = [jnp.asarray(x, "bfloat16") for x in (query, key, value)]
    got = gradient(emulated_gpu.kernels, arrays)
    with jax.enable_x64(True):
        want = gradient(definition.attention_state, _wide(arrays))
    for x, exact in zip(got[:2], want[:2], strict=True):
        error, largest = np.max(np.abs(x - exact)), np.max(np.abs(exact))
        assert error <= 2 * float(jnp.finfo("bfloat16").eps) * largest, (error, largest)


def huge_logits():
    """Rows with logits up to 1e12 have their logsumexp, their output and their gradient.

    The first example has one key with all the weight of a row, the second one has two with
    half of it.
    """
    sizes = np.geomspace(1e6, 1e12, 48)
    query = jnp.broadcast_to(jnp.asarray(sizes, "bfloat16")[:, None, None], (2, 48, 1, 1))
    key = jnp.asarray([[1, -1], [1, 1]], "bfloat16")[..., None, None]
    value = jnp.asarray([[[[1, 0]], [[0, 1]]]] * 2, "bfloat16")
    attend = functools.partial(emulated_gpu.kernels, query, key, scale=0.3)
    state, pull = jax.vjp(lambda value: attend(value=value), value)
    (d_value,) = pull(jax.tree.map(jnp.ones_like, state))
    with jax.enable_x64(True):
        exact = functools.partial(definition.attention_state, scale=0.3)
        want = exact(*_wide((query, key, value)))
    np.testing.assert_array_equal(state.output, want.output)
    eps = float(jnp.finfo("float32").eps)
    np.testing.assert_allclose(state.logsumexp, want.logsumexp, rtol=1.5 * eps)
    expected = np.asarray([[48, 0], [24, 24]])[..., None, None] * np.ones(2)
    np.testing.assert_allclose(np.asarray(d_value, "float64"), expected, rtol=2**-8)


def soft_caps_of_all_sizes():
    """A soft cap far above the logits leaves them as they are."""
    caps = jnp.asarray([50.0, 1e3, 1e4, 1e6, 1e8])
    shapes = (5, 9, 1, 16), (5, 40, 1, 16), (5, 40, 1, 8)
    arrays = [
        jnp.asarray(np.random.default_rng(i).standard_normal(shape), "bfloat16")
        for i, shape in enumerate(shapes)
    ]
    bent = lambda caps: lambda x, b, n, t, s: caps[b] * jnp.tanh(x / caps[b])
    got = emulated_gpu.kernels(*arrays, modifier=bent(caps))
    with jax.enable_x64(True):
        want = definition.attention_state(*_wide(arrays), modifier=bent(_wide(caps)))
    assert_near(got.output, want.output, 2 * jnp.finfo("bfloat16").eps, "output")
    # 5e-5 of a logit of 4, or 6e-7 of a cap of 50: see `pairs._tanh`.
    np.testing.assert_allclose(got.logsumexp, want.logsumexp, atol=5e-5)


def hidden_is_ignored():
    """NaN and Inf that a mask hides change neither output nor gradient.

    No query sees the last keys. Query 100 does not see keys from 99 on, so what it and its
    cotangent are does not reach their gradients.
    """
    case = several()
    inputs = testing.random_inputs(case, "bfloat16")
    spoil = lambda x: x.at[:, -1].set(jnp.nan).at[:, -2, :, 0].set(jnp.inf)

    def seen(query, key, value):
        state = emulated_gpu.attention_state(query, key, value, mask=Causal(-2))
        return jnp.sum(state.output.astype(jnp.float32) ** 2)

    query, key, value = (inputs[x] for x in ("query", "key", "value"))
    got = jax.grad(seen, (0, 1, 2))(query, spoil(key), spoil(value))
    want = jax.grad(seen, (0, 1, 2))(query, key, value)
    for x, y in zip(got, want, strict=True):
        assert_near(x, y, 4 * jnp.finfo("bfloat16").eps, "gradient")
    mine = lambda x: x.at[:, 100].set(jnp.nan)

    def others(query, key, value, spoil):
        state = emulated_gpu.attention_state(query, key, value, mask=Causal(-2))
        weights = spoil(jnp.ones_like(state.output).at[:, 100].set(0))
        return jnp.sum(state.output * jax.lax.stop_gradient(weights))

    want = jax.grad(others, (1, 2))(query, key, value, lambda x: x)
    for bad, spoil in ((mine(query), lambda x: x), (query, mine)):
        got = jax.grad(others, (1, 2))(bad, key, value, spoil)
        for x, y in zip(got, want, strict=True):
            assert np.all(np.isnan(x[:, 0].astype("float32")))
            x, y = x[:, 99:], y[:, 99:]
            assert_near(x, y, 4 * jnp.finfo("bfloat16").eps, "gradient")


def traced_tables_match():
    """A mask whose arrays are traced skips the same blocks."""
    case = SEVERAL["segments"]
    inputs = testing.random_inputs(case, "bfloat16")

    @jax.jit
    def traced(ids):
        return case.call(emulated_gpu.attention_state, inputs | {"query_ids": ids})

    got = traced(inputs["query_ids"])
    with jax.enable_x64(True):
        want = case.call(definition.attention_state, _wide(inputs))
    assert_near(got.output, want.output, 2 * jnp.finfo("bfloat16").eps, "output")


# Faults of synchronisation, as a change of the text of a module.
FAULTS = {
    "the copier does not wait until a block is used": (
        "wgmma",
        "pl.when(j >= stages)(lambda s=stream: plgpu.barrier_wait(s.used.at[slot]))",
        "pass",
    ),
    "keys are read before they arrive": ("forward", "keys.wait(slot)", "pass"),
    "values are read before they arrive": ("forward", "values.wait(slot)", "pass"),
    "a block of keys is given back before it is read": (
        "forward",
        "keys.wait(slot)\n",
        "keys.wait(slot)\n        keys.release(slot)\n",
    ),
    "the groups do not meet": (
        "mma",
        "plgpu.barrier_arrive(met)\n            plgpu.barrier_wait(met)\n",
        "pass\n",
    ),
    "a copy is not waited for": ("mma", "self._wait(arrived, group)", "pass"),
    "queries are read before they arrive": ("mma", "self._wait(ready, group)", "pass"),
}


def faulty(name: str):
    """Runs a causal call by kernels with a fault."""
    module, old, new = FAULTS[name]
    capability = AMPERE if module == "mma" else HOPPER
    module = importlib.import_module(f"jattn.implementations.gpu.{module}")
    text = inspect.getsource(module)
    assert text.count(old) == 1, (name, text.count(old))
    exec(compile(text.replace(old, new), module.__file__, "exec"), module.__dict__)
    for other in [x for x in sys.modules if x.startswith("jattn.implementations.gpu.")]:
        for key in set(vars(sys.modules[other])) & set(vars(module)):
            if inspect.isfunction(vars(module)[key]):
                setattr(sys.modules[other], key, vars(module)[key])
    case = several(lambda x: {"mask": Causal(400)}, S=500)
    inputs = testing.random_inputs(case, "bfloat16")
    attend = functools.partial(emulated_gpu.kernels, capability=capability)
    output = case.call(attend, inputs).output
    want = case.call(definition.attention_state, inputs).output
    assert_near(output, want, 3 * jnp.finfo("bfloat16").eps, "output")
