"""A causal transformer in flax nnx that leaves attending to its caller.

The model makes queries, keys and values, and hands them to a function `attend(layer, query,
key, value)`. So one and the same model learns from packed documents, writes with a cache of
keys, or shows its weights: `attending.py` has a function for each.

B examples, T tokens, N query heads, K key/value heads (N a multiple of K), H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from examples.language_model.settings import Sizes

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class LanguageModel(nnx.Module):
    """Predicts each next token: embedding, layers, and the embedding once more."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            sizes.vocabulary,
            sizes.width,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List(Layer(sizes, rngs=rngs) for _ in range(sizes.layers))
        self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)

    def __call__(self, tokens, position, attend: Attend) -> jax.Array:
        """Computes the logits of each next token.

        Args:
            tokens: `BT`.
            position: Where each token stands in its document, `BT`.
            attend: A function (layer, query, key, value) → output: `BTNH, BTKH, BTKH →
                BTNH`.

        Returns:
            The logits, `BT` and one for each token of the vocabulary.
        """
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, position, lambda *heads, index=index: attend(index, *heads))
        return self.embedding.attend(self.norm(x))


class Layer(nnx.Module):
    """Attention, then a perceptron of each token by itself; both add to what they read."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width = sizes.width
        self.attention = Attention(sizes, rngs=rngs)
        self.widen = linear(width, 4 * width, rngs)
        self.narrow = linear(4 * width, width, rngs, start=0.0)
        self.norms = nnx.List(nnx.RMSNorm(width, rngs=rngs) for _ in range(2))

    def __call__(self, x, position, attend) -> jax.Array:
        """Adds what this layer says to what goes in."""
        x = x + self.attention(self.norms[0](x), position, attend)
        wide = nnx.relu(self.widen(self.norms[1](x)))
        return x + self.narrow(wide * wide)  # So et al., 2021, arXiv:2109.08668


class Attention(nnx.Module):
    """Grouped heads with rotary positions, around a function that attends."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        N, K, H = sizes.heads, sizes.kv_heads, sizes.head_size
        self.head_size = H
        self.query = linear(sizes.width, N * H, rngs)
        self.key = linear(sizes.width, K * H, rngs)
        self.value = linear(sizes.width, K * H, rngs)
        self.output = linear(N * H, sizes.width, rngs, start=0.0)

    def __call__(self, x, position, attend) -> jax.Array:
        """Computes what each token, `BT` and the width, takes over from others."""
        query = rotate(self._heads(self.query(x)), position)
        key = rotate(self._heads(self.key(x)), position)
        value = self._heads(self.value(x))
        output = attend(query, key, value)  # BTNH
        return self.output(output.reshape(*x.shape[:2], -1))

    def _heads(self, x) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_size)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, start: float = 1.0) -> nnx.Linear:
    """Makes a linear map without a bias; what adds to the stream starts as 0."""
    initial = nnx.initializers.normal(start * inputs**-0.5)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=initial, rngs=rngs)


def rotate(heads, position, base: float = 10_000.0) -> jax.Array:
    """Turns each pair of numbers of a head by an angle that grows with the position.

    The product of a query and a key then depends on how far apart they stand.

    Args:
        heads: `BTNH`, H even; the pairs are i and i + H/2.
        position: `BT`.
        base: Pair i turns by position · base^(−2i/H).

    Reference:
        Su et al., 2021, arXiv:2104.09864.
    """
    half = heads.shape[-1] // 2
    rates = base ** -(jnp.arange(half, dtype=heads.dtype) / half)
    angles = position[:, :, None, None].astype(heads.dtype) * rates[None, None, None]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    left, right = heads[..., :half], heads[..., half:]
    turned = [left * cosine - right * sine, left * sine + right * cosine]
    return jnp.concatenate(turned, axis=-1)
