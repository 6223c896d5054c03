"""The public functions: check, choose, call. The mathematics is in the other modules."""

import dataclasses
import functools
from typing import Any

import chex
import jax
from jax.typing import ArrayLike

from jattn.arrays.meshes import across
from jattn.arrays.shapes import flatten_batch, unflatten_batch
from jattn.call.options import Implementation, MaskLike, ModifierLike, PositionLike
from jattn.call.pose import by_name, check_sink, pose
from jattn.call.problem import Operands, Problem, apart, asking_logsumexp
from jattn.context import shards
from jattn.context.choose import settled
from jattn.context.place import Context
from jattn.context.types import told_by_types
from jattn.dropout import Dropout
from jattn.implementations import dispatch
from jattn.implementations.sums import Form, given_as
from jattn.state import State

__all__ = ["attention", "attention_state"]


@told_by_types
@across("BTN.")
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: MaskLike | None = None,
    bias: ArrayLike | None = None,
    modifier: ModifierLike | None = None,
    sink: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    query_position: PositionLike | None = None,
    key_position: PositionLike | None = None,
    dropout: Dropout | None = None,
    context: Context | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends from every query to the keys, and returns the weighted sums of values.

        logitₛ  = modifier(scale · q·kₛ, b, n, t, s) + biasₛ    masked-out s: −∞
        weightₛ = exp(logitₛ) / (Σₛ exp(logitₛ) + exp(sink))
        output  = Σₛ weightₛ vₛ

    B batch, T queries, S keys, N query heads, K key/value heads (N a multiple of K: query
    head n reads key/value head n // (N/K)), H and D head sizes. The batch may be absent
    or several axes; then the index b counts the examples in row-major order.

    A query that sees no key, S = 0 included, has output 0 and every gradient 0. NaN or Inf
    in a key or value that is masked out changes nothing, forward or backward. Softmax
    and sums are in float32 at least, in float64 for float64 inputs; products have the
    precision of `jax.default_matmul_precision`, in derivatives too. Every floating input
    has derivatives of every order, and so have arrays inside modifiers.

    Args:
        query: `BTNH`, one of float16, bfloat16, float32, float64.
        key: `BSKH`, of the same dtype.
        value: `BSKD`, of the same dtype.
        mask: True = may attend: one of `jattn.masks`, a function (b, n, t, s) → bool of
            scalars, or a Boolean array that broadcasts to BNTS; or the `block_table` of
            such a mask. Inside `jax.shard_map` b and n count the examples and heads of one
            device; `jattn.counted.counted_from` gives them their numbers in the whole.
        bias: Added to the logits after the modifier; floating, broadcasts to BNTS.
        modifier: One of `jattn.modifiers` or a function (logit, b, n, t, s) → logit.
        sink: A logit that only takes weight away: one per query head, or one for all.
        scale: Multiplies q·k; 1/√H by default.
        query_position: The position of the first query, or the position of each query, `T`
            or `BT`; 0, 1, … by default. Masks and modifiers see positions of queries as t.
        key_position: The position of the first key, or the position of each key, `S` or
            `BS`; 0, 1, … by default. Masks and modifiers see positions of keys as s.
        dropout: A `jattn.Dropout(rate, rng)`; `shared=True` drops the same pairs in all
            examples and heads.
        context: A `jattn.Context(axis)`, where T and S lie along an axis of a mesh: the
            devices then share the work. The result is the same without it.
        implementation: None chooses one. A name runs that implementation, or raises the
            reason why it cannot run.

    Returns:
        The output, `BTND`, in the dtype of the inputs.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = jnp.zeros((1, 1, 2)), jnp.zeros((3, 1, 2))
        >>> value = jnp.array([[[0.0]], [[1.0]], [[5.0]]])
        >>> attention(query, key, value, mask=lambda b, n, t, s: s < 2)
        Array([[[0.5]]], dtype=float32)

    References:
        Vaswani et al., 2017, arXiv:1706.03762, equation 1; Ainslie et al., 2023,
        arXiv:2305.13245, grouped heads; Xiao et al., 2023, arXiv:2309.17453, sinks.
    """
    options = {
        "mask": mask,
        "bias": bias,
        "modifier": modifier,
        "sink": sink,
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
        "dropout": dropout,
        "context": context,
        "implementation": implementation,
    }
    return attended("attention", "output", query, key, value, **options).output


@told_by_types
@across("BTN. BTN")
def attention_state(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: MaskLike | None = None,
    bias: ArrayLike | None = None,
    modifier: ModifierLike | None = None,
    sink: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    query_position: PositionLike | None = None,
    key_position: PositionLike | None = None,
    dropout: Dropout | None = None,
    context: Context | None = None,
    implementation: Implementation | None = None,
) -> State:
    """Attends like `attention`, and also returns the logsumexp of the logits.

        logsumexp = log Σₛ exp(logitₛ)

    `merge` combines the states over disjoint parts of the keys into the state over all
    keys. The sink and dropout change the output only. To attend in parts with a sink,
    leave the sink out of the parts and merge `State(0, sink)` once. A query that sees
    nothing has output 0 and logsumexp −∞.

    Args:
        query: As in `attention`, and so are all other arguments.
        key: See `attention`.
        value: See `attention`.
        mask: See `attention`.
        bias: See `attention`.
        modifier: See `attention`.
        sink: See `attention`.
        scale: See `attention`.
        query_position: See `attention`.
        key_position: See `attention`.
        dropout: See `attention`.
        context: See `attention`.
        implementation: See `attention`.

    Returns:
        A `State`: `output` BTND in the dtype of the inputs, and `logsumexp` BTN in float32
        at least; both differentiable.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.
    """
    options = {
        "mask": mask,
        "bias": bias,
        "modifier": modifier,
        "sink": sink,
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
        "dropout": dropout,
        "context": context,
        "implementation": implementation,
    }
    return attended("attention_state", "state", query, key, value, **options)


def attended(
    where: str,
    form: Form,
    query,
    key,
    value,
    *,
    mask=None,
    sink=None,
    context=None,
    implementation=None,
    **options,
) -> Any:
    """Attends, and gives the result in a form, for the public function `where`.

    For sums, which are one part of a call, the query may be in the wide precision. Then
    its cotangent is so too, and is rounded when those of all parts are added up.
    """
    narrow = query.astype(key.dtype) if form == "sums" else query
    problem, operands = pose(where, narrow, key, value, mask=mask, **options)
    if form == "sums":
        operands = operands._replace(query=flatten_batch(query, problem.sizes))
    problem = by_name(problem, mask)
    return _attend(where, problem, operands, sink, context, implementation, form)


def _attend(where, problem, operands, sink, context, implementation, form: Form) -> Any:
    """Chooses an implementation and runs it; gives the result in a form."""
    sink = check_sink(where, sink, problem.sizes)
    only_output = form == "output" and sink is None
    problem = problem if only_output else asking_logsumexp(problem)
    name = dispatch.choose(where, problem, jax.default_backend(), implementation)
    names = dispatch.candidates(problem, name, implementation is not None)
    # Only cuDNN's programs hold the mask's numbers. Other programs take them as operands,
    # so that masks with other numbers share one program.
    if context is not None or "cudnn" not in names:
        problem = dataclasses.replace(problem, named=None)
    if context is not None:  # a device has some of the rows
        problem = dataclasses.replace(problem, near=None)
    if context is not None:
        asked = problem, operands, context, jax.default_backend(), implementation
        chosen = settled(where, *asked)
        found = _across(problem, *chosen, names, operands, sink, form)
    else:
        with jax.disable_jit(False):  # as `compiled` does, see there
            found = _on_one(problem, names, operands, sink, form)
    unflatten = lambda x: unflatten_batch(x, problem.sizes)
    return jax.tree.map(unflatten, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 6))
def _across(problem: Problem, place, turns, names, operands, sink, form: Form) -> State:
    """Runs a call on the devices of a mesh."""
    operands, spoil = apart(operands)
    state = shards.attention_state(problem, operands, sink, place, names, turns)
    logsumexp: Any = state.logsumexp if form == "state" else None
    return spoil(state._replace(logsumexp=logsumexp))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _on_one(problem: Problem, names, operands: Operands, sink, form: Form):
    """Runs one of the implementations with these names."""
    operands, spoil = apart(operands)
    sums = dispatch.attend(problem, operands, names)
    chex.assert_equal_shape_prefix([operands.query, *sums], 3)
    chex.assert_type([sums.top, sums.total], problem.wide)
    return spoil(given_as(form, sums, sink, problem.dtype))
