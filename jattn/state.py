"""A partial answer, and how two partial answers combine.

Attention over a part of the keys is a `State`: the output over that part and the
logarithm of the sum that normalized it. `merge` combines the states of disjoint parts
into the state of the whole, in any order and grouping:

    logsumexp = log(exp(a.logsumexp) + exp(b.logsumexp))
    output    = exp(a.logsumexp − logsumexp) · a.output
              + exp(b.logsumexp − logsumexp) · b.output

Blocks of keys, decoding in splits, shared prefixes, paged caches and rings of devices all
rest on this theorem. `EMPTY`, the state of no keys, is the unit: merging it changes
nothing.

A sink is a state too, with output 0 and logsumexp `sink`: leave it out of the parts and
merge it once.

References:
    Milakov and Gimelshein, 2018, arXiv:1805.02867; Ye et al., 2025, arXiv:2501.01005, the
    attention state of FlashInfer.
"""

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from jattn.arrays.checks import check_array, check_real
from jattn.arrays.meshes import across
from jattn.arrays.shapes import wide_dtype

__all__ = ["EMPTY", "State", "merge"]


class State(NamedTuple):
    """The output over some of the keys, `…TND`, and its logsumexp, `…TN`."""

    output: jax.Array
    logsumexp: jax.Array


# Python numbers, which take any dtype and broadcast to any shape.
EMPTY = State(cast(jax.Array, 0.0), cast(jax.Array, -math.inf))


def merge(state: State, *states: State) -> State:
    """Combines the states of disjoint parts of the keys into the state of the whole.

    Commutative exactly, associative to rounding, differentiable in both fields. A part
    that saw nothing (logsumexp −∞) changes nothing; where no part saw anything, the
    result is EMPTY again.

    Each merge rounds the output to the dtype of the parts': in bfloat16 the error grows
    with the number of parts. Give float32 outputs where there are many, or a `context`
    to `attention`, which merges unrounded. Where logits are large, the logsumexp is rounded
    too: in float32 one of 10⁴ by up to 5 · 10⁻⁴, and the shares of the parts by as much.

    Args:
        state: A state, output `…TND` and logsumexp `…TN`; or EMPTY; or the state of a
            sink, `State(0, sink)`, with one number or one per head, `N`.
        *states: More states, of the same shapes.

    Returns:
        The state of all the parts: the output in the dtype of their outputs, the logsumexp
        in float32 at least.

    Raises:
        ValueError: If the shapes of two states differ.

    Example:
        >>> part = State(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))
        >>> merge(part, State(3 * jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))).output
        Array([[[2., 2.]]], dtype=float32)
    """
    parts = (state, *states)
    parts = _checked(parts)
    # States without a shape (EMPTY, sinks) come last: they take the shape of the others.
    parts = tuple(sorted(parts, key=lambda part: jnp.ndim(part.output) == 0))
    like = parts[0].output if jnp.ndim(parts[0].output) else None
    return _merged(like, None, parts)


@across("BTN. BTN")
def _merged(query, key, parts) -> State:
    """Merges states; the result lies on the mesh as `query`, one of the outputs, does."""
    del query, key
    count = sum(jnp.ndim(part.output) > 0 for part in parts)
    types = {tuple(jnp.result_type(x) for x in part) for part in parts[:count]}
    if count > _FEW and len(types) == 1:
        parts = (_merge_many(parts[:count]), *parts[count:])
    return functools.reduce(_merge, parts)


# As long expressions, merges of n parts compile in time n² or more, in a loop in one time.
_FEW = 8


@jax.jit
def _merge_many(parts) -> State:
    """Merges states of the same shapes and dtypes in a loop.

    Shares come first and outputs then, in which the second loop is linear, as
    `jax.linear_transpose` asks.
    """
    wide = wide_dtype(parts[0].output.dtype)
    stacked = lambda name, dtype: jnp.stack([getattr(x, name) for x in parts]).astype(dtype)
    sums = stacked("logsumexp", wide)
    outputs = stacked("output", parts[0].output.dtype)

    def step(output, given):
        return _mixed(output, *given), None

    logsumexp, shares = lax.scan(_shares, sums[0], sums[1:])
    output, _ = lax.scan(step, outputs[0], (outputs[1:], shares))
    return State(output, logsumexp)


@jax.jit
def _merge(a: State, b: State) -> State:
    wide = wide_dtype(jnp.result_type(a.output, b.output))
    a, b = (part._replace(logsumexp=_as(part.logsumexp, wide)) for part in (a, b))
    a, b = _spread(a, b.logsumexp.shape), _spread(b, a.logsumexp.shape)
    logsumexp, shares = _shares(a.logsumexp, b.logsumexp)
    return State(_mixed(a.output, b.output, shares), logsumexp)


def _as(array, dtype) -> jax.Array:
    return jnp.asarray(array).astype(dtype)


def _shares(a, b):
    """Gives the logsumexp of two, and how the outputs of both are combined.

    The state with the larger sum comes first, and the outputs are combined as

        output = low_share (a + b) + (high_share − low_share) high.

    So the order of the arguments changes no bit of the result, even where the compiler
    fuses a multiplication and an addition.
    """
    swap = a < b
    high, low = jnp.where(swap, b, a), jnp.where(swap, a, b)
    # −∞ − −∞ is NaN. With a sink of ∞, which has all the weight, low − top is −∞; it is NaN
    # if the other sum is ∞ too.
    empty = high == -jnp.inf
    top = jnp.where(empty, 0, high)
    # By the difference of the two, so that what one share gains the other one loses: also
    # where the low share is less than a rounding of 1.
    power = jnp.exp(low - top)
    low_share = power / (1 + power)
    high_share = jnp.where(empty, 0, 1 / (1 + power))
    logsumexp = jnp.where(empty, -jnp.inf, top + jnp.log1p(power))
    return logsumexp, (swap, low_share, high_share - low_share)


def _mixed(a, b, shares) -> jax.Array:
    """Combines two outputs by what `_shares` gives, in the dtype of both."""
    dtype = jnp.result_type(a, b)
    a, b = (_as(x, wide_dtype(dtype)) for x in (a, b))
    swap, low, more = (x[..., None] if x.ndim else x for x in shares)
    return (low * (a + b) + more * jnp.where(swap, b, a)).astype(dtype)


def _spread(state: State, shape) -> State:
    """Gives the state with one sink per head broadcast to the other's logsumexp shape."""
    own = state.logsumexp.shape
    is_sink = own and len(own) < len(shape)
    logsumexp = jnp.broadcast_to(state.logsumexp, shape) if is_sink else state.logsumexp
    return state._replace(logsumexp=logsumexp)


def _checked(parts) -> tuple[State, ...]:
    """Checks that all outputs are …TND of one shape and all logsumexps fit them."""
    for part in parts:
        if not isinstance(part, State):
            raise ValueError(
                f"merge: takes states, got {type(part).__name__}; give what "
                f"`attention_state` returns, or `State(output, logsumexp)`."
            )
    parts = tuple(map(_of_arrays, parts))
    outputs = {shape for part in parts if (shape := jnp.shape(part.output))}
    whole = max(outputs, default=(), key=len)
    for part in parts:
        output, logsumexp = jnp.shape(part.output), jnp.shape(part.logsumexp)
        # A state without a shape, EMPTY or a sink's, stands for the state of every query.
        fits = output in ((), whole) and (
            logsumexp == output[:-1] if output else logsumexp in ((), whole[-2:-1])
        )
        if output and not jnp.issubdtype(jnp.result_type(part.output), jnp.floating):
            raise ValueError(
                f"merge: outputs must be floating, got {jnp.result_type(part.output)}; "
                f"convert them with `.astype`."
            )
        if not fits:
            raise ValueError(
                f"merge: states must have outputs …TND and logsumexps …TN of one shape, "
                f"got {output} and {logsumexp} beside {whole}; merge states of the "
                f"same queries."
            )
    return parts


def _of_arrays(part: State) -> State:
    """Gives a state of arrays; a number of Python, which takes any dtype, stays one."""
    checks, fields = {"output": check_array, "logsumexp": check_real}, part._asdict()
    for name, field in fields.items():
        if not isinstance(field, int | float):
            fields[name] = checks[name]("merge", name, field)
    same = all(fields[name] is field for name, field in part._asdict().items())
    return part if same else State(**fields)
