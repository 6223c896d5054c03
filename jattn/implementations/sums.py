"""Partial answers whose maximum and sum stay apart, so that no weight is rounded by them.

A `State` has the logsumexp, top + log total. It is as large as the logits, and so is its
rounding: logits of 1e8 are 8 apart in float32, and log total is lost. Inside of a call, a
sink and the answers of several parts of the keys are therefore combined from `Sums`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn.state import State

__all__ = ["Form", "Sums", "combined", "given_as", "of_state", "state_of", "with_sink"]

Form = Literal["output", "state", "sums"]


class Sums(NamedTuple):
    """Sums over each row of logits, in the wide precision of the problem.

        top    = maxₛ logitₛ              0 where the row sees nothing
        total  = Σₛ exp(logitₛ − top)     0 where the row sees nothing

    Derivatives treat `top` as a constant. So they are right for functions that use both
    together: a change of top changes log total by the opposite amount.

    A kernel may give another `top`, as long as top + log total is the logsumexp.
    """

    output: jax.Array  # BTND, Σₛ weightₛ vₛ; 0 where the row sees nothing
    top: jax.Array  # BTN
    total: jax.Array  # BTN


def state_of(sums: Sums) -> State:
    """Makes the state of the same keys: logsumexp = top + log total."""
    logsumexp = lax.stop_gradient(sums.top) + log_total(sums)
    return State(sums.output, logsumexp)


def of_state(state: State) -> Sums:
    """Makes the sums of a state; total is 1, and has the slope of the logsumexp."""
    seen = state.logsumexp != -jnp.inf
    logsumexp = jnp.where(seen, state.logsumexp, 0)
    top = lax.stop_gradient(logsumexp)
    change = jnp.where(top == jnp.inf, 0, logsumexp - top)  # ∞ − ∞ is NaN
    return Sums(state.output, top, jnp.where(seen, jnp.exp(change), 0))


def log_total(sums: Sums) -> jax.Array:
    """Gives log Σₛ exp(logitₛ − top), −∞ where a row sees nothing."""
    return log_where(sums.total)


def log_where(total) -> jax.Array:
    """Gives the logarithm of a total, −∞ of 0, whose derivative is 0."""
    seen = total != 0
    return jnp.where(seen, jnp.log(jnp.where(seen, total, 1)), -jnp.inf)


def with_sink(sums: Sums, sink: jax.Array | None) -> jax.Array:
    """Gives the output with one more logit in the denominator.

        output · exp(logsumexp) / (exp(logsumexp) + exp(sink))
            = output · share        share = 1 / (1 + exp(sink − top − log total))

    `sink` broadcasts to `…TN`. Without a sink, the output stays as it is.
    """
    if sink is None:
        return sums.output
    seen = sums.total != 0
    sink = jnp.broadcast_to(sink.astype(sums.top.dtype), seen.shape)
    # The two large numbers first: what they have in common goes without rounding.
    excess = sink - lax.stop_gradient(sums.top) - jnp.log(jnp.where(seen, sums.total, 1))
    # As a logarithm, which cannot overflow. The derivative of a sigmoid, share (1 − share),
    # would be 0 where the sink has less weight than a rounding of 1.
    share = jnp.where(seen, jnp.exp(-jnp.logaddexp(excess, 0.0)), 0)
    return sums.output.astype(share.dtype) * share[..., None]


def given_as(form: Form, sums: Sums, sink: jax.Array | None, dtype) -> State | Sums:
    """Gives a state with its sink and the output in `dtype`, or the sums as they are.

    The state of the form "output" has the logsumexp None. Otherwise `jax.debug_infs` would
    report the −∞ of a query that sees nothing, though the caller did not ask for it.
    """
    if form == "sums":
        return sums
    logsumexp: Any = state_of(sums).logsumexp if form == "state" else None
    return State(with_sink(sums, sink).astype(dtype), logsumexp)


def nothing(like: Sums) -> Sums:
    """Makes the sums of no key, where `join` begins, in the shapes and types of `like`."""
    top = jnp.full(like.top.shape, jnp.finfo(like.top.dtype).min, like.top.dtype)
    output, total = (jnp.zeros(x.shape, x.dtype) for x in (like.output, like.total))
    return Sums(output, top, total)


def join(so_far: Sums, part: Sums) -> Sums:
    """Adds a part, from the averages and totals of both.

        top   = max(a.top, b.top)        sum    = own total · exp(own top − top)
        total = a.sum + b.sum            output = Σ sum / total · own output

    Neither part is rounded to the dtype of the inputs: only the end is.
    """
    own = own_top(part)
    top = jnp.maximum(so_far.top, own)
    before = so_far.total * jnp.exp(so_far.top - top)
    added = part.total * jnp.exp(own - top)
    total = before + added
    before, added = (x[..., None] for x in shares_of(before, added))
    return Sums(before * so_far.output + added * part.output, top, total)


@jax.custom_jvp
def shares_of(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the shares of two sums, 0 where both are 0.

    What one gains the other loses, and where one has nearly everything that is little:

        a.share′ = (b.share · a′ − a.share · b′) / (a + b)

    As a difference of a′ and a.share · (a + b)′ it would be lost where logits are large,
    for so are the tangents of the sums.
    """
    return quotient(a, a + b), quotient(b, a + b)


@shares_of.defjvp
def _(primals, tangents):
    (a, b), (d_a, d_b) = primals, tangents
    shares = shares_of(a, b)
    change = quotient(shares[1] * d_a - shares[0] * d_b, a + b)
    return shares, (change, -change)


@jax.custom_jvp
def quotient(part: jax.Array, total: jax.Array) -> jax.Array:
    """Computes part / total, 0 where both are 0.

    Where logits are large, so are the tangents of sums, and what they have in common has
    to go before anything is multiplied by it. And a total may be 1e-30: JAX's rule has the
    square of it. So

        quotient′ = (part′ − quotient · total′) / total
    """
    return part / jnp.where(total == 0, 1, total)


@quotient.defjvp
def _(primals, tangents):
    (part, total), (d_part, d_total) = primals, tangents
    found = quotient(part, total)
    return found, quotient(d_part - found * d_total, total)


def own_top(part: Sums) -> jax.Array:
    """Gives the maximum of a part, a constant; the least number where it saw nothing."""
    least = jnp.finfo(part.top.dtype).min
    return lax.stop_gradient(jnp.where(part.total == 0, least, part.top))


def finish(sums: Sums) -> Sums:
    """Gives rows that see nothing the maximum 0."""
    return sums._replace(top=jnp.where(sums.total == 0, 0, sums.top))


@jax.jit
def combined(*parts: Sums) -> Sums:
    """Gives the sums over all keys from those over disjoint parts of them."""
    so_far = nothing(parts[0])
    for part in parts:
        so_far = join(so_far, part)
    return finish(so_far)
