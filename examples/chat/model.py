"""The model: a Llama in plain functions over a tree of arrays.

    x ← embedding of each token
    x ← x + attention(norm(x))        in each layer, one after the other
    x ← x + perceptron(norm(x))
    logits = norm(x) · embedding

Where the weights of all layers are stacked, `through` scans over them. On CPU a scan would
copy each layer out of the stack, in each step. There the layers are a list, and the program
of one layer is called for each of them.

The functions know nothing of caches. They hand queries, keys and values to a function

    attend(kv, layer, query, key, value) → output, kv

so one model reads whole texts, writes with a cache, and verifies drafts.

B examples, T tokens, N query heads, K key/value heads, H head size, E width, F width inside
the perceptron, V vocabulary, L layers.

References:
    Touvron et al., 2023, arXiv:2302.13971 (Llama); Ben Allal et al., 2025,
    arXiv:2502.02737 (SmolLM2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_static

import jattn
from jattn.masks import Causal

Attend = Callable[..., tuple[jax.Array, Any]]


@register_static
@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a model is, and the two numbers that its weights were trained with."""

    vocabulary: int  # V
    layers: int  # L
    width: int  # E
    hidden: int  # F
    heads: int  # N
    kv_heads: int  # K
    head_size: int  # H
    context: int  # the longest text in training, in tokens
    base: float = 10_000.0  # of the rotary angles
    epsilon: float = 1e-5  # keeps the norm of zeros finite


def shapes(sizes: Sizes) -> dict[str, Any]:
    """Gives the shape of each array in the tree of weights, with its layers stacked."""
    L, E, F = sizes.layers, sizes.width, sizes.hidden
    heads = sizes.heads * sizes.head_size
    kv_heads = sizes.kv_heads * sizes.head_size
    layers = {
        "attention_norm": (L, E),
        "query": (L, heads, E),
        "key": (L, kv_heads, E),
        "value": (L, kv_heads, E),
        "output": (L, E, heads),
        "hidden_norm": (L, E),
        "gate": (L, F, E),
        "up": (L, F, E),
        "down": (L, E, F),
    }
    return {"embedding": (sizes.vocabulary, E), "layers": layers, "norm": (E,)}


def stacked(layers: list[dict]) -> dict:
    """Stacks the weights of all layers, for `through` to scan over."""
    return jax.tree.map(lambda *each: jnp.stack(each), *layers)


def hidden(params, sizes: Sizes, tokens, position, kv, attend: Attend):
    """Gives what the last layer says of each token.

    Args:
        params: The weights; see `shapes`.
        sizes: How large the model is.
        tokens: `BT`.
        position: Where each token stands in its text, `BT`.
        kv: What `attend` reads and changes: a cache of all layers, or None. It is used up.
        attend: A pytree that is a function (kv, layer, query, key, value) → output, kv, of
            shapes `BTNH, BTKH, BTKH → BTNH`; `jax.tree_util.Partial` makes one.

    Returns:
        The hidden states, `BTE`, and the kv after the last layer.
    """
    x, turn = begin(params, sizes, tokens, position)
    x, kv = through(params["layers"], sizes, x, kv, turn, attend)
    return norm(x, params["norm"], sizes.epsilon), kv


def begin(params, sizes: Sizes, tokens, position):
    """Gives the embedding of each token, and the angles of its place."""
    return jnp.take(params["embedding"], tokens, axis=0), angles(position, sizes)


def through(layers, sizes: Sizes, x, kv, turn, attend: Attend):
    """Takes x through all layers, in one scan or by the same program for each."""
    if isinstance(layers, dict):
        return _scanned(layers, sizes, x, kv, turn, attend)
    number = jnp.zeros((), jnp.int32)
    for weights in layers:
        x, kv, number = layer(weights, sizes, x, kv, number, turn, attend)
    return x, kv


@functools.partial(jax.jit, donate_argnames=("kv",))
def _scanned(layers, sizes: Sizes, x, kv, turn, attend: Attend):
    step = lambda carry, weights: (layer(weights, sizes, *carry, turn, attend), None)
    start = x, kv, jnp.zeros((), jnp.int32)
    return jax.lax.scan(step, start, layers)[0][:2]


@functools.partial(jax.jit, donate_argnames=("x", "kv", "number"))
def layer(weights, sizes: Sizes, x, kv, number, turn, attend: Attend):
    """Takes x through one layer; also gives the kv, and the number of the next layer."""
    heads = queries_keys_values(weights, sizes, x, turn)
    output, kv = attend(kv, number, *heads)
    x = x + linear(output.reshape(*x.shape[:2], -1), weights["output"])
    return x + perceptron(weights, sizes, x), kv, number + 1


def logits(params, x) -> jax.Array:
    """Gives the logits of each next token: the embedding is used a second time."""
    return linear(x, params["embedding"]).astype(jnp.float32)


def whole(params, sizes: Sizes, tokens) -> jax.Array:
    """Gives the logits after each token of whole texts, `BTV`, without a cache."""
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    position = jnp.broadcast_to(position, tokens.shape)
    x, _ = hidden(params, sizes, tokens, position, None, Partial(_causal))
    return logits(params, x)


def _causal(kv, layer, query, key, value):
    del layer
    return jattn.attention(query, key, value, mask=Causal()), kv


def queries_keys_values(weights, sizes: Sizes, x, turn):
    """Gives the heads of a layer; queries and keys are turned by their positions."""
    x = norm(x, weights["attention_norm"], sizes.epsilon)
    split = lambda y: y.reshape(*y.shape[:2], -1, sizes.head_size)
    heads = (split(linear(x, weights[name])) for name in ("query", "key", "value"))
    query, key, value = heads
    return rotate(query, turn), rotate(key, turn), value


def perceptron(weights, sizes: Sizes, x) -> jax.Array:
    """Computes SwiGLU: down(silu(gate · x) ⊙ (up · x)). Shazeer, 2020, arXiv:2002.05202."""
    x = norm(x, weights["hidden_norm"], sizes.epsilon)
    gate = jax.nn.silu(linear(x, weights["gate"]))
    return linear(gate * linear(x, weights["up"]), weights["down"])


def linear(x, weight) -> jax.Array:
    """Maps the last axis; a weight is `out × in`, as in the file."""
    return jnp.einsum("...i,oi->...o", x, weight)


def norm(x, weight, epsilon: float) -> jax.Array:
    """Divides by the root of the mean square, in float32, and multiplies by the weight."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    unit = (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype)
    return unit * weight.reshape(*[1] * (x.ndim - 1), -1)


def angles(position, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Gives cosine and sine of each token's angles, `BT1(H/2)`: position · base^(−2i/H)."""
    H = sizes.head_size
    frequency = sizes.base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = position[..., None, None].astype(jnp.float32)
    angle = angle * frequency.reshape(1, 1, 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(heads, turn) -> jax.Array:
    """Turns number i of each head together with number i + H/2.

    Su et al., 2021, arXiv:2104.09864. Angles are float32 in any dtype.
    """
    cosine, sine = turn
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)
