"""Attention in one tile: all T × S logits at once.

This is the simplest implementation. It suits small inputs, a look at logits and weights,
and checks of other implementations. JAX differentiates it directly, to any order.
"""

import chex
import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem, index, kept
from jattn.implementations import shared
from jattn.implementations.isolated import isolate_values
from jattn.implementations.kernel import Plain
from jattn.operations.varying import locally
from jattn.state import State


def attention_logits(problem: Problem, operands: Operands) -> jax.Array:
    """Computes the logits BNTS: scaled, modified, biased, and −∞ for masked pairs."""
    return locally(_logits, (problem,), operands)


def _logits(problem: Problem, operands: Operands) -> jax.Array:
    at = index(problem, operands)
    allowed = shared.allowed(problem, operands, at)
    query = operands.query.astype(problem.wide)
    key = operands.key.astype(problem.wide)
    if allowed is None:
        products = operands.scale * shared.products(query, key)
        logits = shared.logits(problem, operands, at, products)
    else:  # a NaN of a masked pair must reach no other pair; see `shared`
        query, query_poison = shared.isolate(query)
        key, key_poison = shared.isolate(key)
        products = operands.scale * shared.products(query, key)
        if problem.modifier is not None:
            products = shared.harmless(products, allowed)
        logits = shared.logits(problem, operands, at, products)
        key_poison = jnp.repeat(key_poison, problem.sizes.G, axis=2)
        logits += _rows(query_poison) + _columns(key_poison)
        logits = jnp.where(allowed, logits, -jnp.inf)
    logits = jnp.broadcast_to(logits, problem.sizes.BNTS)
    chex.assert_type(logits, problem.wide)
    return logits


def attention_weights(problem: Problem, operands: Operands):
    """Computes the weights BNTS, before dropout, and the logsumexp BNT of the logits."""
    return locally(_weights, (problem,), operands)


def _weights(problem: Problem, operands: Operands):
    logits = _logits(problem, operands)
    # weightₛ = exp(logitₛ − top) / total, the same for any top. With the maximum no
    # exponential overflows; and as the result does not depend on it, it is a constant.
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    exponentials = jnp.exp(logits - top[..., None])
    total = jnp.sum(exponentials, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    logsumexp = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return exponentials / total[..., None], logsumexp


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

    def attention_state(self, problem: Problem, operands: Operands) -> State:
        """Computes the output BTND in the wide precision and the logsumexp BTN."""
        value, logsumexp = Operands._fields.index("value"), 1
        linear = frozenset({value}), frozenset({logsumexp})
        return locally(_state, (problem,), operands, linear=linear)


def _state(problem: Problem, operands: Operands) -> State:
    weights, logsumexp = _weights(problem, operands)
    weights = drop(problem, operands, weights)
    value = operands.value.astype(problem.wide)
    allowed = shared.allowed(problem, operands, index(problem, operands))
    if allowed is None:
        output = shared.sums(weights, value)
    else:
        value, poison = isolate_values(value)
        poison = _columns(jnp.repeat(poison, problem.sizes.G, axis=2))
        seen = jnp.sum(jnp.where(allowed, poison, 0), axis=-1)  # 0 or NaN, BNT
        output = shared.sums(weights, value) + jnp.swapaxes(seen, 1, 2)[..., None]
    return State(output, jnp.swapaxes(logsumexp, 1, 2))


def _rows(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)[..., :, None]  # BTN to BNT1


def _columns(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)[..., None, :]  # BSN to BN1S
