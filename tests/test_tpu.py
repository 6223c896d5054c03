"""The kernels for TPU, emulated: equal to the definition, without races."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jattn
from jattn import definition
from jattn.arrays.shapes import Sizes
from jattn.call.pose import pose
from jattn.implementations.tpu.kernel import TPU
from jattn.implementations.tpu.pairs import evaluate
from jattn.masks import Causal, Lengths, Segments, Window
from jattn.testing import CASES, assert_matches_definition, errors, random_inputs
from tests.helpers import emulated_tpu

NAMED = {case.name: case for case in CASES}
# Those that take paths of their own through the kernels.
TELLING = ("value_size", "by_head_and_example", "lengths", "captured", "bias_per_key")
SIZES = Sizes(batch=(1,), T=200, S=300, N=2, K=1, H=16, D=8)


def refused(case) -> str | None:
    inputs = random_inputs(case)
    options = case.options(inputs)
    options.pop("sink", None)
    arrays = (inputs[name] for name in ("query", "key", "value"))
    return TPU().refusal(pose("test", *arrays, **options)[0], "tpu")


def derived(function, case, inputs, names):
    """Output, logsumexp, and gradients of a sum of both."""

    def loss(chosen):
        output, logsumexp = case.call(function, inputs | chosen)
        seen = jnp.where(logsumexp == -jnp.inf, 0, logsumexp)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(seen)), (output, logsumexp)

    chosen = {name: inputs[name] for name in names}
    return jax.jit(jax.grad(loss, has_aux=True))(chosen)


def assert_close(case, sizes, names=("query", "key", "value"), **how):
    inputs = random_inputs(case, sizes=sizes)
    got = derived(
        functools.partial(emulated_tpu.attention_state, **how), case, inputs, names
    )
    want = derived(definition.attention_state, case, inputs, names)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.max(np.abs(y), initial=1e-30, where=np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.xdist_group(x)) for x in TELLING]
)
def test_emulated_kernels_equal_definition_in_every_derivative(name):
    assert_matches_definition(emulated_tpu.attention_state, NAMED[name])


# What comes of weights that are taken again from a logsumexp, which float32 rounds: to
# half a unit of 10 or 20 in `everything`. That moves all weights of a row together, in
# blockwise too. Tangents are blockwise, with the logsumexp of the kernel, whose products
# are summed in another order: large logits differ by a rounding, and weights by as much.
ROUNDED = {
    "everything": ("d_value", "d_output", "d_logsumexp"),
    "large_logits": ("d_output", "d_logsumexp"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_emulated_kernels_are_exact_but_for_a_rounded_logsumexp(name):
    found = errors(NAMED[name], emulated_tpu.attention_state)
    eps = np.finfo(np.float32).eps
    rounding = eps * found["logsumexp"][2]
    for what, (error, baseline, largest) in found.items():
        more = rounding if what in ROUNDED[name] else 0
        assert error <= 2 * baseline + (2 * eps + more) * largest, what


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_emulated_output_equals_definition(case):
    if sentence := refused(case):
        pytest.skip(sentence)
    inputs = random_inputs(case)
    got = case.call(emulated_tpu.attention_state, inputs)
    want = case.call(definition.attention_state, inputs)
    large = np.max(np.abs(want.logsumexp), where=np.isfinite(want.logsumexp), initial=1)
    np.testing.assert_allclose(got.output, want.output, atol=1e-6)
    np.testing.assert_allclose(got.logsumexp, want.logsumexp, atol=1e-6 * large)


def several(name, options=lambda x: {}, extra=None, **different):
    sizes = dataclasses.replace(SIZES, **different)
    return jattn.testing.Case(name, options, extra or {}, sizes)


def ids(letter):
    return NAMED["segments_with_padding"].extra[{"T": "query_ids", "S": "key_ids"}[letter]]


def normal(*letters):
    size = lambda sizes, x: 1 if x == "1" else getattr(sizes, x)
    return lambda sizes, rng: rng.standard_normal([size(sizes, x) for x in letters])


def capped_alibi(x):
    slopes, cap = x["slopes"], x["cap"]

    def modifier(logit, b, n, t, s):
        distance = jnp.abs(t - s).astype(logit.dtype)
        return cap * jnp.tanh(logit / cap) - slopes[n] * distance / 100

    return {"modifier": modifier, "mask": Causal(100)}


# Two or three blocks of queries and of keys; the last are not full. Two heads share one of
# keys and values, which have sizes of their own.
RACY = (
    several("plain"),
    several("causal", lambda x: {"mask": Causal(40)}),
    several("bfloat16", lambda x: {"mask": Causal(40)}),
    several("window with empty blocks", lambda x: {"mask": Window(20, 0)}),
    several(
        "segments",
        lambda x: {"mask": Segments(x["query_ids"], x["key_ids"], padding_id=0)},
        {"query_ids": ids("T"), "key_ids": ids("S")},
    ),
    several(
        "documents",
        lambda x: {"mask": lambda b, n, t, s: (t >= s) & (x["of"][b, t] == x["of"][b, s])},
        {"of": ids("S")},
    ),
    several(
        "lengths, and rows that see nothing",
        lambda x: {"mask": Lengths(x["key_lengths"], x["query_lengths"])},
        NAMED["lengths"].extra,
        batch=(2,),
    ),
    several(
        "slopes",
        lambda x: {"modifier": jattn.modifiers.ALiBi(x["slopes"]), "mask": Causal(100)},
        {"slopes": normal("N")},
    ),
    several(
        "capped alibi",
        capped_alibi,
        {"slopes": normal("N"), "cap": NAMED["soft_cap"].extra["cap"]},
    ),
    several("bias per key", lambda x: {"bias": x["bias"]}, {"bias": normal("N", "1", "S")}),
    several(
        "bias per query", lambda x: {"bias": x["bias"]}, {"bias": normal("1", "T", "1")}
    ),
    several(
        "sink", lambda x: {"sink": x["sink"], "mask": Causal(-2)}, {"sink": normal("N")}
    ),
    several("dropout", NAMED["dropout"].options),
    several("one query", N=4, K=2, T=1),
    several(
        "late keys, two heads of them",  # so that the second of two blocks is alone
        lambda x: {"mask": lambda b, n, t, s: (s >= 130) & (s <= t + 130)},
        K=2,
        T=150,
    ),
)


def finite(array):
    return jnp.where(jnp.isfinite(array), array, 0)


RACED = {case.name: case for case in RACY}


@pytest.mark.parametrize("case", RACY, ids=lambda case: case.name)
def test_several_blocks_have_no_races_and_no_uninitialized_memory(case, capfd):
    cores = min(case.sizes.B * case.sizes.K, 2)  # to which the grid gives them
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    dtype = "bfloat16" if case.name == "bfloat16" else "float32"
    tolerance = 2.5 * float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 2e-5
    inputs = random_inputs(case, dtype)
    floating = {k: x for k, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def derived(attend):
        @jax.jit
        def run(inputs, floating):
            state, pull = jax.vjp(lambda xs: case.call(attend, inputs | xs), floating)
            return state, pull(jax.tree.map(finite, state))

        return jax.tree_util.tree_leaves_with_path(run(inputs, floating))

    got = derived(functools.partial(emulated_tpu.kernels, interpret=params))
    want = derived(definition.attention_state)
    for (where, x), (_, y) in zip(got, want, strict=True):
        large = np.max(np.abs(y), where=np.isfinite(y), initial=0)
        np.testing.assert_allclose(
            *(np.asarray(z, np.float64) for z in (x, y)),
            rtol=0,
            atol=float(tolerance * large),
            err_msg=jax.tree_util.keystr(where),
        )
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_segments_of_queries_give_the_same_cotangents():
    block = 4 * SIZES.H * 128
    assert_close(
        RACED["slopes"], SIZES, ("query", "key", "value", "slopes"), resident=block
    )


def test_bfloat16_equals_definition():
    assert_matches_definition(emulated_tpu.attention_state, NAMED["everything"], "bfloat16")


def test_what_is_not_finite_in_hidden_keys_touches_nothing():
    inputs = random_inputs(NAMED["causal"])
    spoil = lambda x: x.at[:, -1].set(jnp.nan).at[:, -2, :, 0].set(jnp.inf)
    key, value = spoil(inputs["key"]), spoil(inputs["value"])

    def seen(query, key, value):
        options = {"mask": Causal(-2)}
        state = emulated_tpu.attention_state(query, key, value, **options)
        return jnp.sum(state.output**2)

    gradient = jax.grad(seen, (0, 1, 2))
    got = gradient(inputs["query"], key, value)
    want = gradient(inputs["query"], inputs["key"], inputs["value"])
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_traced_tables_skip_the_same():
    case = RACED["segments"]
    inputs = random_inputs(case)

    @jax.jit
    def traced(ids):
        return case.call(emulated_tpu.attention_state, inputs | {"query_ids": ids})

    got = traced(inputs["query_ids"])
    want = case.call(definition.attention_state, inputs)
    np.testing.assert_allclose(got.output, want.output, atol=1e-6)


def test_named_elsewhere_it_raises_the_reason():
    query = jnp.zeros((4, 1, 8))
    with pytest.raises(ValueError, match=r'"tpu"\): runs on TPU only, and the platform'):
        jattn.attention(query, query, query, implementation="tpu")


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        ("float16", {}, "bfloat16 and float32"),
        ("float32", {"mask": lambda b, n, t, s: jnp.arange(9)[t - s] > 3}, "joins queries"),
        (
            "float32",
            {"modifier": lambda x, b, n, t, s: jnp.sort(x[None])[0]},
            "cannot evaluate",
        ),
    ],
)
def test_what_kernels_cannot_do_is_refused_in_a_sentence(dtype, options, message):
    query = jnp.zeros((4, 1, 8), dtype)
    problem, _ = pose("test", query, query, query, **options)
    assert message in (TPU().refusal(problem, "tpu") or "")


def second(attend):
    """Second derivatives of a function of one array, by every order of modes."""
    f = lambda x: jnp.sum(attend(x) ** 2)
    along = lambda g: lambda x: jax.jvp(g, (x,), (jnp.cos(x),))[1]
    summed = lambda g: lambda x: jnp.sum(g(x) ** 2)
    return {
        "jvp of grad": along(jax.grad(f)),
        "grad of jvp": jax.grad(along(f)),
        "grad of grad": jax.grad(summed(jax.grad(f))),
        "jvp of jvp": along(along(f)),
        "hvp of batch": jax.vmap(along(jax.grad(f))),
    }


@pytest.mark.parametrize("order", second(jnp.sin))
def test_second_derivatives_lower_without_derivatives_of_kernels(order):
    attend = lambda x: jattn.attention(x, x, x, mask=Causal())
    function = jax.jit(second(attend)[order])
    shape = (2, 256, 2, 64) if "batch" in order else (256, 2, 64)
    exported = jax.export.export(function, platforms=("tpu",))(
        jax.ShapeDtypeStruct(shape, "float32")
    )
    assert "@tpu_custom_call" in exported.mlir_module()


def test_second_derivatives_equal_definition():
    inputs = random_inputs(NAMED["causal"])
    fixed = {"mask": Causal(), "modifier": jattn.modifiers.SoftCap(2.0)}

    def derived(attend):
        f = lambda x: attend(x, inputs["key"], inputs["value"], **fixed).output
        return [jax.jit(x)(inputs["query"]) for x in list(second(f).values())[:2]]

    got, want = map(derived, (emulated_tpu.attention_state, definition.attention_state))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.max(np.abs(y)))


def test_distances_are_exact_as_floats_up_to_the_longest_input():
    far = np.int32(2**22)
    program = jax.make_jaxpr(lambda t, s: -jnp.abs(t - s).astype(jnp.float32) / 3)
    inputs = [np.array([[far - 1, far, 7]]), np.array([[0], [3], [far]])]
    jaxpr = program(far, far).jaxpr
    want = evaluate(jaxpr, [jnp.int32(x) for x in inputs])
    got = evaluate(jaxpr, [jnp.int32(x) for x in inputs], small=(0, 1))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("tpu",)])
def test_one_program_is_exported_for_several_platforms(platforms):
    function = jax.jit(lambda x: jattn.attention(x, x, x, mask=Causal()))
    exported = jax.export.export(function, platforms=platforms)(
        jax.ShapeDtypeStruct((256, 2, 64), "float32")
    )
    assert exported.mlir_module().count("@tpu_custom_call") == 1
