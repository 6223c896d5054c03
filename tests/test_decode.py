"""Few queries by a long buffer: every way to compute it, and what it does not copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jattn
from jattn.adapters.jax_nn import dot_product_attention
from jattn.implementations import dispatch, parts
from jattn.implementations.decode import Decode
from jattn.masks import Causal, Lengths, Window
from jattn.testing import CASES, assert_matches_definition
from tests.helpers.params import quick_and_slow

B, S, N, K, H = 2, 23, 4, 2, 8


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """A chunk has 3 keys, and few keys are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CHUNK", 3)
        patch.setitem(dispatch.IMPLEMENTATIONS, "decode", Decode(least=1))
        jax.clear_caches()  # programs of other sizes
        yield
    jax.clear_caches()


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(T=1, dtype="float32"):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


@functools.partial(jax.jit, static_argnames=("window", "name"))
def state(query, key, value, position, window=None, name=None):
    mask = Causal() if window is None else Causal() & Window(window, 0)
    options = {"mask": mask, "query_position": position, "implementation": name}
    return jattn.attention_state(query, key, value, **options)


def same(got, want, atol=2e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5)


QUICK = ("segments_with_padding",)


@pytest.mark.parametrize("case", quick_and_slow(CASES, QUICK, group=True))
def test_it_equals_the_definition(case):
    def named(query, key, value, **options):
        if options.get("mask") is None and options.get("modifier") is None:
            options["mask"] = lambda b, n, t, s: s >= 0
        options["implementation"] = "decode"
        return jattn.attention_state(query, key, value, **options)

    sizes = case.sizes
    if sizes.T > 16 or 0 in (*sizes.BNTS, sizes.H, sizes.D):
        pytest.skip("refused")
    assert_matches_definition(named, case)


def test_one_program_serves_every_position():
    call = arrays(T=2)
    for first in (0, 3, 11, 12, 21):  # up to the half by chunks, then all at once
        want = state(*call, jnp.int32(first), name="dense")
        same(state(*call, jnp.int32(first)), want)
    assert state._cache_size() == 2


def test_a_window_is_visited_where_it_is():
    call = arrays()
    for position in (2, 13, 22):
        want = state(*call, jnp.int32(position), window=4, name="dense")
        same(state(*call, jnp.int32(position), window=4), want)


@jax.jit
def by_lengths(query, key, value, lengths):
    return dot_product_attention(query, key, value, key_value_seq_lengths=lengths)


def test_lengths_of_each_example_under_jit_and_vmap():
    call, lengths = arrays(), jnp.array([[3, 9], [22, 1], [0, 23]])
    want = [
        jattn.attention(*call, mask=Lengths(x), implementation="dense") for x in lengths
    ]
    same(by_lengths(*call, lengths[0]), want[0])
    same(by_lengths(*call, lengths[1]), want[1])
    mapped = jax.vmap(by_lengths, (None, None, None, 0))(*call, lengths)
    same(mapped, jnp.stack(want))


def test_a_nan_reaches_its_own_head_and_nothing_beyond_the_mask():
    query, key, value = arrays()
    for array in ("key", "value"):
        call = {"query": query, "key": key, "value": value}
        spoiled = call[array].at[:, 20:].set(jnp.nan).at[1, 4, 0].set(jnp.nan)
        call[array] = spoiled
        for position in (8, 19):  # by chunks, and all at once
            got = state(**call, position=jnp.int32(position))
            same(got, state(**call, position=jnp.int32(position), name="dense"))
            assert np.isnan(got.output).mean() == 1 / 4  # half the heads of one example


def test_gradients_are_those_of_the_definition():
    query, key, value = arrays()

    @functools.partial(jax.jit, static_argnames="name")
    def gradient(arrays, position, name=None):
        return jax.grad(lambda x: (state(*x, position, name=name).output ** 2).sum())(
            arrays
        )

    call = [query, key, value]
    same(gradient(call, jnp.int32(7)), gradient(call, jnp.int32(7), name="dense"), 1e-5)


def test_explain_says_what_is_left_out():
    call = arrays()
    found = jattn.explain(*call, mask=Causal(), query_position=7)
    assert found.implementation == "decode"
    assert found.blocks.sizes == (1, 3)
    assert found.blocks.empty == 5 / 8
    found = jattn.explain(*call, mask=Causal(), query_position=12)  # beyond the half
    assert found.blocks.sizes == (1, 23)
    assert found.blocks.empty == 0
    traced = []
    ask = lambda p: traced.append(jattn.explain(*call, mask=Causal(), query_position=p))
    jax.eval_shape(ask, jax.ShapeDtypeStruct((), "int32"))
    assert "known when it runs (of 1 × 8 blocks of 1 × 3)" in str(traced[0])


@pytest.mark.parametrize(
    ("T", "options", "message"),
    [
        (17, {"mask": Causal()}, "takes up to 16 queries, got T=17"),
        (1, {}, "leaves out keys that a mask or modifier hides, got neither"),
    ],
)
def test_what_it_refuses(T, options, message):
    with pytest.raises(ValueError, match=message):
        jattn.attention(*arrays(T), implementation="decode", **options)


def test_it_is_for_cpu_and_long_buffers(monkeypatch):
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "decode", Decode())

    def refusal(length, **options):
        shapes = [
            jax.ShapeDtypeStruct((1, x, 2, 8), "float32") for x in (1, length, length)
        ]
        return jattn.explain(*shapes, mask=Causal(), **options).refusals["decode"]

    assert refusal(512) is None
    assert refusal(511) == "pays where there are 512 keys or more, got S=511."
    assert refusal(512, platform="tpu") == "runs on CPU only, and the platform is tpu."


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_an_updated_buffer_is_not_copied(monkeypatch, dtype):
    for name in ("CHUNK", "LONG"):
        monkeypatch.setattr(parts, name, 256)

    def step(key, value, query, token, position):
        put = lambda x: lax.dynamic_update_slice_in_dim(x, token, position, 1)
        key, value = put(key), put(value)
        options = {"mask": Causal(), "query_position": position}
        return jattn.attention(query, key, value, **options), key, value

    shape = lambda *x: jax.ShapeDtypeStruct(x, dtype)
    buffer = shape(1, 16384, 4, 64)  # a chunk takes 1.2 MB, of any buffer
    call = buffer, buffer, shape(1, 1, 8, 64), shape(1, 1, 4, 64)
    position = jax.ShapeDtypeStruct((), "int32")
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*call, position).compile()
    memory, size = program.memory_analysis(), 2 * buffer.size * buffer.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size
