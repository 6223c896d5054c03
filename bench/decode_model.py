"""A token of a real model by caches and by `jax.nn`, for `bench.decode`."""

import functools

import jax
import jax.numpy as jnp

from bench.decode_rows import compare, draw
from jattn import caches
from jattn.masks import Causal

LAYERS, WIDTH, HIDDEN, WORDS = 30, 576, 1536, 49152  # a model of 135 million parameters
HEADS, KV_HEADS = 9, 3
SIZE = WIDTH // HEADS


def model() -> None:
    """Times a token of a model of 135 million parameters, 64 tokens filled."""
    shapes = {
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, KV_HEADS * SIZE),
        "v": (WIDTH, KV_HEADS * SIZE),
        "o": (WIDTH, WIDTH),
        "up": (WIDTH, 2 * HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    weights = [
        {name: 0.02 * draw(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)
    ]
    words, runs = 0.02 * draw(WORDS, WIDTH), {}
    for capacity in (256, 2048):
        kv = caches.empty(1, capacity, KV_HEADS, SIZE)
        kv = kv.append(*2 * [draw(1, 64, KV_HEADS, SIZE)])
        plain = *2 * [draw(1, capacity, KV_HEADS, SIZE)], jnp.int32(64)
        for name, attend, one in (("jattn", _by_jattn, kv), ("jax.nn", _by_jax_nn, plain)):
            stack = [jax.tree.map(jnp.copy, one) for _ in range(LAYERS)]
            program = jax.jit(functools.partial(_token, attend), donate_argnums=2)
            runs[f"{name}, capacity {capacity}"] = _decoding(program, weights, words, stack)
    compare("135 M parameters", runs, "jax.nn, capacity 2048")


def _token(attend, weights, words, stack):
    """Computes the next word of the model, and the caches after it."""
    x, after = words[:1], []
    for w, kv in zip(weights, stack, strict=True):
        part = lambda name, w=w, x=x: (x @ w[name]).reshape(1, 1, -1, SIZE)
        output, kv = attend(kv, part("q"), part("k"), part("v"))
        x = x + output.reshape(1, WIDTH) @ w["o"]
        gate, up = jnp.split(x @ w["up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ w["down"]
        after.append(kv)
    return jnp.argmax(x @ words.T), after


def _by_jattn(kv, *token):
    output, kv = kv.extend(*token, mask=Causal())
    return output, kv.truncate(64)  # so that the next call is the same again


def _by_jax_nn(kv, query, key, value):
    keys = jax.lax.dynamic_update_slice_in_dim(kv[0], key, kv[2], 1)
    values = jax.lax.dynamic_update_slice_in_dim(kv[1], value, kv[2], 1)
    count = {"key_value_seq_lengths": kv[2][None] + 1}
    output = jax.nn.dot_product_attention(query, keys, values, **count)
    return output, (keys, values, kv[2])


def _decoding(program, weights, words, stack):
    """Runs a program on caches that it takes, and keeps what it gives for the next."""
    held = [stack]

    def run():
        word, held[0] = program(weights, words, held[0])
        jax.block_until_ready(word)

    return run
