"""A partial answer, and how two of them combine.

Attention over a part of the keys is a `State`: the output over that part and the
logarithm of the sum that normalized it. States of disjoint parts `merge` into the state
of the whole, in any order and grouping:

    logsumexp = log(exp(a.logsumexp) + exp(b.logsumexp))
    output    = exp(a.logsumexp − logsumexp) · a.output
              + exp(b.logsumexp − logsumexp) · b.output

This is the one theorem behind blocks of keys, decoding in splits, shared prefixes, paged
caches and rings of devices. `EMPTY`, which has seen no key, is the unit.

A sink is a state too, of output 0 and logsumexp `sink`: leave it out of the parts and
merge it in once.

References:
    Milakov and Gimelshein, 2018, arXiv:1805.02867; Ye et al., 2025, arXiv:2501.01005, the
    attention state of FlashInfer.
"""

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jattn.shapes import wide_dtype

__all__ = ["EMPTY", "State", "merge", "with_sink"]


class State(NamedTuple):
    """The output over some of the keys, `…TND`, and its logsumexp, `…TN`."""

    output: jax.Array
    logsumexp: jax.Array


# Python numbers, which take any dtype and broadcast to any shape.
EMPTY = State(cast(jax.Array, 0.0), cast(jax.Array, -math.inf))


def merge(state: State, *states: State) -> State:
    """Combines the states of disjoint parts of the keys into that of the whole.

    Commutative exactly, associative to rounding, differentiable in both fields; a part
    that saw nothing (logsumexp −∞) changes nothing, and where no part saw anything the
    result is EMPTY again.

    Args:
        state: A state, output `…TND` and logsumexp `…TN`, or EMPTY.
        *states: More of them, of the same shapes.

    Returns:
        The state of all the parts: the output in the dtype of theirs, the logsumexp in
        float32 at least.

    Raises:
        ValueError: If the shapes of two states differ.

    Example:
        >>> part = State(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))
        >>> merge(part, State(3 * jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))).output
        Array([[[2., 2.]]], dtype=float32)
    """
    parts = (state, *states)
    _check(parts)
    return _merge(parts) if len(parts) > 1 else state


@jax.jit
def _merge(parts) -> State:
    dtype = jnp.result_type(*(part.output for part in parts))
    wide = wide_dtype(dtype)
    logsumexps = [jnp.asarray(part.logsumexp).astype(wide) for part in parts]
    row_max = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logsumexps))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    shares = [jnp.exp(x - row_max) for x in logsumexps]
    total = sum(shares[1:], shares[0])
    seen = total != 0  # a NaN is seen
    safe = jnp.where(seen, total, 1)
    outputs = [
        (share / safe)[..., None] * jnp.asarray(part.output).astype(wide)
        for share, part in zip(shares, parts, strict=True)
    ]
    logsumexp = jnp.where(seen, row_max + jnp.log(safe), -jnp.inf)
    return State(sum(outputs[1:], outputs[0]).astype(dtype), logsumexp)


def with_sink(state: State, sink: jax.Array | None) -> jax.Array:
    """The output with one more logit in the denominator; `sink` broadcasts to `…TN`.

    output · exp(logsumexp) / (exp(logsumexp) + exp(sink)), in a form that cannot overflow.
    """
    if sink is None:
        return state.output
    seen = state.logsumexp != -jnp.inf
    sink = jnp.broadcast_to(sink, seen.shape).astype(state.logsumexp.dtype)
    excess = jnp.where(seen, state.logsumexp, 0) - sink
    return state.output * jnp.where(seen, jax.nn.sigmoid(excess), 0)[..., None]


def _check(parts) -> None:
    shapes = [(jnp.shape(part.output), jnp.shape(part.logsumexp)) for part in parts]
    shapes = [shape for shape in shapes if shape != ((), ())]
    for output, logsumexp in shapes:
        if output[:-1] != logsumexp or output != shapes[0][0]:
            raise ValueError(
                f"merge: states must have outputs …TND and logsumexps …TN of one shape, "
                f"got {output} and {logsumexp} beside {shapes[0][0]}; merge states of the "
                f"same queries."
            )
