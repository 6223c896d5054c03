"""A few queries by all slots of a part, in as few passes as XLA:CPU can make of them.

A mask is a bound of the logits, ∞ for a pair that counts and −∞ for another:

    logits ← min(scale · q · k + bias, bound)      weights = exp(logits − max logit)

XLA (jax 0.10 and 0.12) makes one pass of all that, which the calling thread begins and
ends. It makes none of a `where`, a lower limit of the maximum, an array that is cut, or of
heads in another order. Then each step is a pass of its own, and from 2¹⁵ logits on it is
divided between threads. To wake the other one takes 20 to 40 µs, as long as the pass.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jattn.call.problem import Operands, Problem, index
from jattn.implementations import shared
from jattn.implementations.source import Part, longer, scaled_products

# From so many logits on this is faster: (1, 8192, 8, 2, 64) takes 0.15 ms and not 0.20 on
# Zen 5, (1, 2048, 8, 2, 64) 0.066 and 0.064.
LEAST = 2**15


def pays(problem: Problem, operands: Operands) -> bool:
    """Says whether `sums` takes a call, and is faster than a pass for each step."""
    x = problem.sizes
    # A modifier may give NaN for a pair that is hidden, and no output would show one where
    # values have no numbers.
    takes = problem.mask is not None and problem.modifier is None and operands.rng is None
    if not takes or not x.are_known or x.D == 0:
        return False
    # XLA joins nothing to a product of one row.
    return x.G * x.T > 1 and x.B * x.N * x.T * x.S >= LEAST


def sums(problem: Problem, operands: Operands, part: Part):
    """Gives the maximum and the sum BNT of each row, and the sum of the values, BKRD.

    A row that sees nothing gets no bound, so that its maximum is finite; its sums are 0. A
    NaN in a key that is hidden stays, min(NaN, −∞) = NaN, and is found in the output.
    """
    allowed = shared.allowed(problem, operands, index(problem, operands))
    allowed = _by_rows(problem, allowed)
    seen = jnp.any(allowed, axis=-1, keepdims=True)
    bound = jnp.where(allowed | ~seen, jnp.inf, -jnp.inf).astype(problem.wide)
    # The barrier: XLA would make the bound again in each step, and then join no steps.
    bound = lax.optimization_barrier(longer(bound, part.slots, -jnp.inf))
    logits = scaled_products(problem, operands, part)
    if operands.bias is not None:
        logits += longer(_by_rows(problem, operands.bias), part.slots)
    logits = jnp.minimum(logits, bound)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    output = jnp.where(seen, part.sums(weights, problem.wide), 0)
    # It begins after the output: of two that are ready XLA gives one to another thread.
    total = lax.reduce(weights, _zero_after(output), lax.add, (weights.ndim - 1,))
    total = jnp.where(seen[..., 0], total, 0)
    top, total = (x.reshape(problem.sizes.BNTS[:3]) for x in (top, total))
    return top, total, output


def _by_rows(problem: Problem, array):
    """Gives an array BNTS as BKRS; with one row for all where they are alike."""
    x, (first, heads, rows, _) = problem.sizes, array.shape
    if heads == rows == 1:
        return jnp.broadcast_to(array, (first, 1, 1, x.S))
    array = jnp.broadcast_to(array, (first, x.N, x.T, x.S))
    return array.reshape(first, x.K, x.G * x.T, x.S)


@custom_vmap
def _zero_after(array) -> jax.Array:
    """Gives a 0 that is there only after an array is; NaN if its first number is.

    So the array must be what `parts` looks for NaN in, or one row's would reach all sums.
    """
    return jnp.sum(jnp.minimum(jnp.abs(array.ravel()[:1]), 0))


@_zero_after.def_vmap
def _(size, mapped, array):
    """Gives one for all slices: JAX cannot map where a sum begins."""
    del size, mapped
    return _zero_after(array), False
