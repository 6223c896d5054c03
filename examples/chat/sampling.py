"""Sampling: the logits become a token.

Each text has a random number of its own, and each place in it another one. So a text is the
same alone, in a batch with others, and with drafts.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How freely tokens are drawn."""

    temperature: float = 0.0  # divides the logits; 0 takes the likeliest token
    top_p: float = (
        1.0  # draws from the likeliest tokens that have this probability together
    )


def draw(logits, rng, position, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws a token for a place in a text.

    Args:
        logits: `V`.
        rng: The random number of the text.
        position: Where the token will stand in it.
        sampling: How freely.

    Returns:
        The token, and the logarithm of the probability that the model gives it.
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits)
    else:
        warm = logits / sampling.temperature
        warm = jnp.where(warm >= least(warm, sampling.top_p), warm, -jnp.inf)
        token = jax.random.categorical(jax.random.fold_in(rng, position), warm)
    token = token.astype(jnp.int32)
    return token, logits[token] - jax.nn.logsumexp(logits)


def least(logits, top_p: float) -> jax.Array:
    """Finds the smallest logit of the likeliest, of probability `top_p` together.

    Holtzman et al., 2020, arXiv:1904.09751.
    """
    if top_p >= 1:
        return jnp.min(logits)
    downwards = -jnp.sort(-logits)
    probability = jax.nn.softmax(downwards)
    before = jnp.cumsum(probability) - probability  # 0 for the first: one always counts
    return jnp.min(jnp.where(before < top_p, downwards, jnp.inf))
