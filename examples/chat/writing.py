"""Writing: prompts are read in pieces, and then one token follows another.

`read` does both: with a piece of T tokens for a prompt, and with T = 1 for a step. It
appends the tokens, and draws the next one of each example.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.chat import layers, model
from examples.chat.model import Sizes
from examples.chat.sampling import Sampling, draw

PIECE = 64  # tokens of a prompt at once; a longer piece takes more memory, and pads more


def read(params, kv, tokens, count, rng, first, *, sizes: Sizes, sampling: Sampling):
    """Reads tokens after those in the cache, and draws the next one of each example.

    Args:
        params: The weights.
        kv: The cache of all layers; it is used up.
        tokens: `BT`.
        count: How many of the T tokens of each example count, `B`.
        rng: A random number of each text, `B`.
        first: The number of the first of the B examples in the cache.
        sizes: Those of the model.
        sampling: How freely tokens are drawn.

    Returns:
        The tokens `B`, the logarithms of their probabilities `B`, and the cache. They mean
        something for examples with a count above 0.
    """
    alone = {name: params[name] for name in ("embedding", "norm")}
    x, kv, turn, length = _begin(alone, sizes, kv, tokens, count, first)
    attend = layers.extending(sizes, first, count)
    x, kv = model.through(params["layers"], sizes, x, kv, turn, attend)
    return *_end(alone, sizes, x, count, rng, length, sampling), kv


@functools.partial(jax.jit, donate_argnames=("kv",))
def _begin(params, sizes: Sizes, kv, tokens, count, first):
    """Gives what the first layer needs, and how long each text is with its new tokens."""
    kv = layers.reserved(kv, sizes, first, count)
    start = layers.lengths(kv, sizes)
    start = jax.lax.dynamic_slice_in_dim(start, first, tokens.shape[0], 0)
    position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, turn = model.begin(params, sizes, tokens, position)
    return x, kv, turn, start + count


@functools.partial(jax.jit, static_argnames=("sampling",))
def _end(params, sizes: Sizes, x, count, rng, place, sampling: Sampling):
    """Draws the token at `place` of each text, after its last token that counts."""
    last = jnp.maximum(count - 1, 0)[:, None, None]
    x = jnp.take_along_axis(x, last, axis=1)[:, 0]
    x = model.norm(x, params["norm"], sizes.epsilon)
    drawing = jax.vmap(lambda *each: draw(*each, sampling))
    return drawing(model.logits(params, x), rng, place)


@dataclasses.dataclass
class Writer:
    """A model, a cache of B examples, and how to draw."""

    params: Any
    sizes: Sizes
    kv: Any
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    piece: int = PIECE
    calls: int = 0  # of the model, so far

    @property
    def batch(self) -> int:
        """Says how many examples the cache has room for, B."""
        return self.kv.length.size // self.sizes.layers

    def rng(self, text: int) -> jax.Array:
        """Gives the random number of a text."""
        return jax.random.fold_in(jax.random.key(self.seed), text)

    def rngs(self, texts: Sequence[int]) -> jax.Array:
        """Gives those of several texts."""
        return jnp.stack([self.rng(text) for text in texts])

    def read(self, tokens, count, rng, first: int = 0):
        """Calls the model once, and keeps the cache that it gives."""
        tokens, count = (jnp.asarray(x, jnp.int32) for x in (tokens, count))
        fixed = {"sizes": self.sizes, "sampling": self.sampling}
        place = jnp.asarray(first, jnp.int32)
        *drawn, self.kv = read(self.params, self.kv, tokens, count, rng, place, **fixed)
        self.calls += 1
        token, log_probability = map(np.asarray, drawn)
        return token, log_probability

    def read_prompts(self, prompts: Sequence[Sequence[int]], rng, first: int = 0):
        """Reads prompts of any lengths, piece by piece, and draws what follows each.

        Returns:
            The tokens, and the logarithms of their probabilities, one of each prompt.
        """
        token = np.zeros(len(prompts), np.int32)
        log_probability = np.zeros(len(prompts), np.float32)
        for start in range(0, max(map(len, prompts)), self.piece):
            pieces = [prompt[start : start + self.piece] for prompt in prompts]
            count = np.array([len(piece) for piece in pieces], np.int32)
            drawn, likely = self.read(padded(pieces, self.piece), count, rng, first)
            token = np.where(count > 0, drawn, token)  # that after the last piece stays
            log_probability = np.where(count > 0, likely, log_probability)
        return token, log_probability


def padded(pieces: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Puts pieces of unlike lengths into one array, with 0 after each, never stored."""
    array = np.zeros((len(pieces), length), np.int32)
    for row, piece in zip(array, pieces, strict=True):
        row[: len(piece)] = piece
    return array


class Drawn(NamedTuple):
    """A step of all examples."""

    tokens: np.ndarray  # B
    log_probabilities: np.ndarray  # B
    alive: np.ndarray  # B, which of them had not ended before


def write(
    writer: Writer, drawn, rng, ends: Collection[int], most: int, stopped: Callable = bool
) -> Iterator[Drawn]:
    """Writes on, from the tokens that were drawn after the prompts.

    Args:
        writer: Its cache holds the prompts.
        drawn: The tokens that follow them, and the logarithms of their probabilities.
        rng: A random number of each text.
        ends: The tokens that end a text.
        most: How many tokens each text has at most.
        stopped: Asked before each step whether to write no more.

    Yields:
        The tokens of each step; those that are drawn last are not in the cache.
    """
    token, likely = drawn
    alive = np.ones(len(token), bool)
    for step in range(most):
        yield Drawn(token, likely, alive)
        alive = alive & ~np.isin(token, list(ends))
        if step + 1 == most or not alive.any() or stopped():
            return
        token, likely = writer.read(token[:, None], alive.astype(np.int32), rng)
