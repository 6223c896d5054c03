"""Writing: a prompt is read into a cache, and then one token follows another."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from examples.language_model.attending import empty_caches, extend
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Sizes
from examples.language_model.text import DOCUMENT

_extend = nnx.jit(extend)


def write(
    model: LanguageModel,
    sizes: Sizes,
    prompt: Sequence[int],
    room: int,
    *,
    temperature: float = 0.7,
    seed: int = 0,
) -> Iterator[int]:
    """Continues a document, token by token, until it ends or the room does.

    Args:
        model: Predicts each next token.
        sizes: Its sizes.
        prompt: How the document begins.
        room: How many tokens the cache holds, those of the prompt included.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Decides what is drawn.

    Yields:
        The tokens after the prompt.
    """
    rng = jax.random.key(seed)
    tokens, cache = [DOCUMENT, *prompt], empty_caches(sizes, 1, room)
    for length in range(len(tokens), room):
        logits, cache = _extend(model, jnp.array([tokens]), cache)
        token = int(draw(logits[0, -1], temperature, jax.random.fold_in(rng, length)))
        if token == DOCUMENT:
            return
        yield token
        tokens = [token]


def draw(logits, temperature: float, rng) -> jax.Array:
    """Draws a token, as likely as exp(logit / temperature)."""
    if temperature == 0:
        return jnp.argmax(logits)
    return jax.random.categorical(rng, logits / temperature)
