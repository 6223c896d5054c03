"""Attention in one tile: all T × S logits at once.

This is the simplest implementation. It suits small inputs, a look at logits and weights,
and checks of other implementations. JAX differentiates it directly, to any order.
"""

import chex
import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem, index, kept
from jattn.implementations import shared
from jattn.implementations.isolated import isolated_sums
from jattn.implementations.kernel import Plain
from jattn.implementations.sums import Sums
from jattn.operations.mapped import cond_any
from jattn.operations.varying import locally


def attention_logits(problem: Problem, operands: Operands) -> jax.Array:
    """Computes the logits BNTS: scaled, modified, biased, and −∞ for masked pairs."""
    return locally(_logits, (problem,), operands)


def _allowed(problem: Problem, operands: Operands) -> jax.Array | None:
    return shared.allowed(problem, operands, index(problem, operands))


def _logits(problem: Problem, operands: Operands) -> jax.Array:
    return _logits_of(problem, operands, _allowed(problem, operands))


def _logits_of(problem: Problem, operands: Operands, allowed) -> jax.Array:
    query, key = (x.astype(problem.wide) for x in (operands.query, operands.key))

    def plain(query, key):
        products = operands.scale * shared.products(query, key)
        return _of_products(problem, operands, allowed, products)

    if allowed is None:
        return plain(query, key)
    # Checkpointed, so that a gradient keeps nothing of it where it does not run.
    careful = jax.checkpoint(lambda *xs: _isolated(problem, operands, allowed, *xs))
    spoiled = ~(jnp.all(jnp.isfinite(query)) & jnp.all(jnp.isfinite(key)))
    return cond_any(spoiled, careful, plain, query, key)


def _of_products(problem, operands, allowed, products, poison=None):
    if problem.modifier is not None:
        products = shared.harmless(products, allowed)
    at = index(problem, operands)
    logits = shared.logits(problem, operands, at, products)
    logits = logits if poison is None else logits + poison
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    logits = jnp.broadcast_to(logits, problem.sizes.BNTS)
    chex.assert_type(logits, problem.wide)
    return logits


def _isolated(problem, operands, allowed, query, key):
    """Computes logits in which a NaN of a masked pair reaches no other pair; see `shared`.

    Products of infinite numbers are ±∞ or NaN, as they are without a mask.
    """
    true = jax.lax.stop_gradient(operands.scale * shared.products(query, key))
    query, query_poison = shared.isolate_with_slope(query)
    key, key_poison = shared.isolate_with_slope(key)
    key_poison = jnp.repeat(key_poison, problem.sizes.G, axis=2)
    poison = _rows(query_poison) + _columns(key_poison)
    infinite = jnp.isinf(true) & jnp.isnan(poison)
    products = operands.scale * shared.products(query, key)
    products = shared.sloped_as(products, jnp.where(infinite, true, products))
    poison = jnp.where(infinite, 0, poison)
    return _of_products(problem, operands, allowed, products, poison)


def attention_weights(problem: Problem, operands: Operands):
    """Computes the weights BNTS, before dropout; of each row the maximum and sum, BNT."""
    return locally(_weights, (problem,), operands)


def _weights(problem: Problem, operands: Operands):
    return _weights_of(problem, operands, _allowed(problem, operands))


def _weights_of(problem: Problem, operands: Operands, allowed):
    logits = _logits_of(problem, operands, allowed)
    # weightₛ = exp(logitₛ − top) / total, the same for any top. With the maximum no
    # exponential overflows; and as the result does not depend on it, it is a constant.
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    exponentials = jnp.exp(logits - top[..., None])
    total = jnp.sum(exponentials, axis=-1)
    weights = exponentials / jnp.where(total == 0, 1, total)[..., None]
    if allowed is None:
        return weights, top, total
    # A NaN in a row must not reach the gradients of values that the row does not see.
    spoiled, hide = jnp.any(jnp.isnan(total)), lambda x: jnp.where(allowed, x, 0)
    return cond_any(spoiled, hide, lambda x: x, weights), top, total


def drop(problem: Problem, operands: Operands, weights: jax.Array) -> jax.Array:
    """Applies dropout to the weights BNTS: keeps some, times 1/(1 − rate), others are 0."""
    keep = kept(problem, operands, index(problem, operands))
    if keep is None:
        return weights
    return jnp.where(keep, weights / (1 - problem.rate), 0)


class Dense(Plain):
    """Attention with all logits at once."""

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Refuses nothing, on any platform."""
        del problem, platform

    def block_sizes(self, problem, operands, platform) -> None:
        """Gives None, as it skips no block."""
        del problem, operands, platform

    def attend(self, problem: Problem, operands: Operands) -> Sums:
        """Computes the output BTND and the sums of each row BTN, in the wide precision."""
        value = Operands._fields.index("value")
        linear = frozenset({value}), frozenset(map(Sums._fields.index, ("top", "total")))
        return locally(_attend, (problem,), operands, linear=linear)


def _attend(problem: Problem, operands: Operands) -> Sums:
    allowed = _allowed(problem, operands)
    weights, top, total = _weights_of(problem, operands, allowed)
    weights = drop(problem, operands, weights)
    value = operands.value.astype(problem.wide)
    if allowed is None:
        output = shared.sums(weights, value)
    else:
        output = isolated_sums(weights, allowed, value)
    return Sums(output, *(jnp.swapaxes(x, 1, 2) for x in (top, total)))


def _rows(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)[..., :, None]  # BTN to BNT1


def _columns(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)[..., None, :]  # BSN to BN1S
