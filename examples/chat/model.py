"""The model: a Llama in plain functions over a tree of arrays.

    x ← embedding of each token
    x ← x + attention(norm(x))        in each layer, one after the other: a `scan`
    x ← x + perceptron(norm(x))
    logits = norm(x) · embedding

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jattn
from jattn.masks import Causal

Attend = Callable[..., tuple[jax.Array, Any]]


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
    """The shape of each array in the tree of weights."""
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


def hidden(params, sizes: Sizes, tokens, position, kv, attend: Attend):
    """What the last layer says of each token.

    Args:
        params: The weights; see `shapes`.
        sizes: How large the model is.
        tokens: `BT`.
        position: Where each token stands in its text, `BT`.
        kv: What `attend` reads and changes: a cache of all layers, or None.
        attend: A function (kv, layer, query, key, value) → output, kv, of shapes
            `BTNH, BTKH, BTKH → BTNH`.

    Returns:
        The hidden states, `BTE`, and the kv after the last layer.
    """
    turn = angles(position, sizes)

    def step(carry, inputs):
        x, kv = carry
        layer, weights = inputs
        heads = queries_keys_values(weights, sizes, x, turn)
        output, kv = attend(kv, layer, *heads)
        x = x + linear(output.reshape(*x.shape[:2], -1), weights["output"])
        return (x + perceptron(weights, sizes, x), kv), None

    x = jnp.take(params["embedding"], tokens, axis=0)
    number = jnp.arange(sizes.layers, dtype=jnp.int32)
    (x, kv), _ = jax.lax.scan(step, (x, kv), (number, params["layers"]))
    return norm(x, params["norm"], sizes.epsilon), kv


def logits(params, x) -> jax.Array:
    """The logits of each next token: the embedding is used a second time."""
    return linear(x, params["embedding"]).astype(jnp.float32)


def whole(params, sizes: Sizes, tokens) -> jax.Array:
    """The logits after each token of whole texts, `BTV`, without a cache."""

    def attend(kv, layer, query, key, value):
        return jattn.attention(query, key, value, mask=Causal()), kv

    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    position = jnp.broadcast_to(position, tokens.shape)
    return logits(params, hidden(params, sizes, tokens, position, None, attend)[0])


def queries_keys_values(weights, sizes: Sizes, x, turn):
    """The heads of a layer; queries and keys are turned by their positions."""
    x = norm(x, weights["attention_norm"], sizes.epsilon)
    split = lambda y: y.reshape(*y.shape[:2], -1, sizes.head_size)
    heads = (split(linear(x, weights[name])) for name in ("query", "key", "value"))
    query, key, value = heads
    return rotate(query, turn), rotate(key, turn), value


def perceptron(weights, sizes: Sizes, x) -> jax.Array:
    """SwiGLU: down(silu(gate · x) ⊙ (up · x)). Shazeer, 2020, arXiv:2002.05202."""
    x = norm(x, weights["hidden_norm"], sizes.epsilon)
    gate = jax.nn.silu(linear(x, weights["gate"]))
    return linear(gate * linear(x, weights["up"]), weights["down"])


def linear(x, weight) -> jax.Array:
    """A linear map of the last axis; a weight is `out × in`, as in the file."""
    return jnp.einsum("...i,oi->...o", x, weight)


def norm(x, weight, epsilon: float) -> jax.Array:
    """Divides by the root of the mean square, in float32, and multiplies by the weight."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype) * _rows(weight, x)


def _rows(weight, x) -> jax.Array:
    return weight.reshape(*[1] * (x.ndim - 1), -1)


def angles(position, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of each token, `BT1(H/2)`: position · base^(−2i/H)."""
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
