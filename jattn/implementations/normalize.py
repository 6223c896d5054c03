"""What turns logits into log weights: for all queries, or for whole rows at hand.

    log weight = (logit − top) − log total          total = Σₛ exp(logitₛ − top)

A sink is one more key of the total. Top is a constant in derivatives, and so its slope is
that of log total.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem
from jattn.implementations.blockwise.sweep import Normalizer
from jattn.implementations.run import attend
from jattn.implementations.sums import log_total, log_where


def normalizer(problem: Problem, operands: Operands, sink, logsumexp) -> Normalizer:
    """Computes what the logits are lowered by, BTN; takes it from a logsumexp, if given."""
    if logsumexp is None:
        sums = attend(problem, operands, apart=True)  # log weights are of single heads
        return _with_sink(lax.stop_gradient(sums.top), log_total(sums), sink)
    return _with_sink(*_parts(logsumexp), sink)


def normalizer_of(logits, sink, logsumexp) -> Normalizer:
    """Computes the same from whole rows of logits, −∞ for masked pairs.

    So derivatives subtract pair by pair what a weight loses to all weights of its row.
    """
    if logsumexp is not None:
        return _with_sink(*_parts(logsumexp), sink)
    top = lax.stop_gradient(jnp.max(logits, axis=-1))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return _with_sink(top, log_where(total), sink)


def _parts(logsumexp):
    """Gives the constant part of a logsumexp, and 0 with its slope."""
    finite = jnp.isfinite(logsumexp)
    top = lax.stop_gradient(jnp.where(finite, logsumexp, 0))
    return top, logsumexp - top


def _with_sink(top, rest, sink) -> Normalizer:
    """Counts the sink, which broadcasts to the rows."""
    if sink is not None:
        excess = of_rows(sink, top) - top
        # Of −∞ and −∞ the derivative would be NaN, and so that of the whole sink.
        nothing = (rest == -jnp.inf) & (excess == -jnp.inf)
        both = jnp.logaddexp(jnp.where(nothing, 0, rest), excess)
        rest = jnp.where(nothing, -jnp.inf, both)
    # A query that sees nothing has weights of 0. A gradient keeps this number, and
    # `jax.debug_infs` would report ∞ in it.
    return Normalizer(top, jnp.where(rest == -jnp.inf, jnp.finfo(rest.dtype).max, rest))


def of_rows(sink, rows) -> jax.Array:
    """Gives the sink of each row, in their dtype."""
    return jnp.broadcast_to(sink.astype(rows.dtype), rows.shape)
