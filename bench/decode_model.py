"""A token of a real model by caches, by `jax.nn` and by torch, for `bench.decode`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bench import candidates
from bench.decode_rows import compare, draw
from jattn import caches
from jattn.masks import Causal

LAYERS, WIDTH, HIDDEN, WORDS = 30, 576, 1536, 49152  # a model of 135 million parameters
HEADS, KV_HEADS = 9, 3
SIZE = WIDTH // HEADS
FILLED = 64


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
    words = 0.02 * draw(WORDS, WIDTH)
    runs = {"torch, the filled slice": _by_torch(weights, words)}
    for capacity in (256, 2048):
        kv = caches.empty(1, capacity, KV_HEADS, SIZE)
        kv = kv.append(*2 * [draw(1, FILLED, KV_HEADS, SIZE)])
        plain = *2 * [draw(1, capacity, KV_HEADS, SIZE)], jnp.int32(FILLED)
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
    return output, kv.truncate(FILLED)  # so that the next call is the same again


def _by_jax_nn(kv, query, key, value):
    keys = jax.lax.dynamic_update_slice_in_dim(kv[0], key, kv[2], 1)
    values = jax.lax.dynamic_update_slice_in_dim(kv[1], value, kv[2], 1)
    count = {"key_value_seq_lengths": kv[2][None] + 1}
    output = jax.nn.dot_product_attention(query, keys, values, **count)
    return output, (keys, values, kv[2])


def _by_torch(weights, words):
    """Makes the same of torch, which writes into arrays; None where it is missing."""
    if candidates.missing(["torch"]):
        return None
    import torch

    torch.set_num_threads(candidates.num_cores())
    tensor = lambda x: torch.from_numpy(np.array(x))
    layers, words = [jax.tree.map(tensor, w) for w in weights], tensor(words)
    kvs = torch.zeros(LAYERS, 2, 1, KV_HEADS, FILLED + 1, SIZE)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run():
        x = words[:1]
        with torch.inference_mode():
            for w, kv in zip(layers, kvs, strict=True):
                query, *pair = ((x @ w[name]).view(1, 1, -1, SIZE) for name in "qkv")
                for array, token in zip(kv, pair, strict=True):
                    array[:, :, FILLED] = token[:, 0]
                output = attend(query.transpose(1, 2), *kv, enable_gqa=True)
                x = x + output.view(1, WIDTH) @ w["o"]
                gate, up = (x @ w["up"]).chunk(2, dim=-1)
                x = x + (torch.nn.functional.silu(gate) * up) @ w["down"]
            return (x @ words.T).argmax()

    return run


def _decoding(program, weights, words, stack):
    """Runs a program on caches that it takes, and keeps what it gives for the next."""
    held = [stack]

    def run():
        word, held[0] = program(weights, words, held[0])
        jax.block_until_ready(word)

    return run
