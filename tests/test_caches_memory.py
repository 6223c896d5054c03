"""Caches of a real size, by the chunks and programs that users get."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches
from jattn.masks import Causal, Lengths

S = 1024  # 128 at most alone, chunks of 256 to the half, then all at once


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_each_way_gives_attention_over_what_is_filled(dtype):
    query, key, value = draw(0, 1, 2, 4, 8), draw(1, 1, S, 2, 8), draw(2, 1, S, 2, 8)
    kv = caches.empty(1, S, 2, 8, dtype=dtype).append(key, value)
    key, value = kv.key, kv.value
    attend = jax.jit(lambda kv, query: kv.attend_state(query, mask=Causal()))
    position = jax.jit(
        lambda query, first: jattn.attention_state(
            query, key, value, mask=Causal(), query_position=first, implementation="dense"
        )
    )
    for length in (2, 128, 129, 256, 511, 513, 1024):
        got = attend(kv.truncate(length), query)
        want = position(query, jnp.int32(length - 2))
        np.testing.assert_allclose(got.output, want.output, atol=1e-6)
        np.testing.assert_allclose(got.logsumexp, want.logsumexp, atol=1e-6)


def test_a_step_has_no_array_of_the_size_of_the_cache_but_the_cache():
    kv, token = caches.empty(1, 8192, 4, 64), jnp.ones((1, 1, 4, 64))
    step = lambda kv, token: kv.extend(token, token, token, mask=Causal())
    program = jax.jit(step, donate_argnums=0).lower(kv, token).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * sum(x.nbytes for x in jax.tree.leaves(kv))
    arrays = kv.store.keys, kv.store.values
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in arrays)
    for array in arrays:
        # No instruction makes another: what has this shape is a parameter or an update.
        shape = "f32[" + ",".join(map(str, array.shape)) + "]"
        lines = [x.split(" = ")[1] for x in program.as_text().splitlines() if " = " in x]
        made = {x.split("} ")[-1].split("(")[0] for x in lines if x.startswith(shape)}
        in_place = {"parameter", "get-tuple-element", "dynamic-update-slice", "fusion"}
        assert made <= in_place, made


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_rows_of_keys_have_beyond_the_slots_is_never_read(dtype):
    query, key, value = draw(0, 1, 1, 4, 8), draw(1, 1, S, 2, 8), draw(2, 1, S, 2, 8)
    kv = caches.empty(1, S, 2, 8, dtype=dtype).append(key, value)
    keys = kv.store.keys
    assert keys.shape[-1] * keys.itemsize % 128 == 64  # an odd number of lines
    assert kv.capacity == S
    junk = jnp.asarray(jnp.nan if dtype == "float32" else 127, keys.dtype)
    store = dataclasses.replace(kv.store, keys=keys.at[..., S:].set(junk))
    other = dataclasses.replace(kv, store=store)
    for read in (
        lambda kv: kv.attend(query),
        lambda kv: kv.truncate(200).attend(query, mask=Causal()),
        lambda kv: kv.take([0, 0]).truncate(9).key,
        lambda kv: kv.dequantize("float32").key,
        lambda kv: kv.dequantize("float32").truncate(9).append(key[:, :5], key[:, :5]).key,
        lambda kv: jax.grad(lambda q: kv.attend(q).sum())(query),
    ):
        np.testing.assert_array_equal(read(other), read(kv))


def test_an_axis_of_vmap_copies_no_buffer():
    """Of each example's own length, the same as in a batch; XLA lays no key out anew."""
    B, S, K, H = 4, 2048, 4, 64
    buffer = jax.ShapeDtypeStruct((B, S, K, H), jnp.float32)
    query = jax.ShapeDtypeStruct((B, 1, K, H), jnp.float32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)

    def attend(query, buffer, other, length):
        options = {"mask": Lengths(length), "implementation": "decode"}
        return jattn.attention(query, buffer, other, **options)

    program = jax.jit(jax.vmap(attend)).lower(query, buffer, buffer, lengths).compile()
    memory = program.memory_analysis()
    # An eighth each: a chunk of keys, one of values, and both again with heads first.
    assert memory.temp_size_in_bytes < 0.75 * B * S * K * H * 4
