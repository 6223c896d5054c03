"""The public functions: check, choose, call. The mathematics is in the other modules."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jattn import explanation
from jattn.call.problem import (
    Operands,
    Problem,
    apart,
    asking_logsumexp,
    check_bias,
    check_sink,
    pose,
    pose_mask,
    select_rows,
)
from jattn.explanation import Explanation
from jattn.implementations import dense, dispatch
from jattn.implementations.blockwise.plan import decided
from jattn.meshes import across
from jattn.shapes import Sizes, check_array
from jattn.state import State, with_sink

__all__ = [
    "attention",
    "attention_logits",
    "attention_state",
    "attention_weights",
    "explain",
]


@across("BTN.")
def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
    implementation=None,
) -> jax.Array:
    """Attends from every query to the keys, and returns the weighted sums of values.

        logitₛ  = modifier(scale · q·kₛ, b, n, t, s) + biasₛ    masked-out s: −∞
        weightₛ = exp(logitₛ) / (Σₛ exp(logitₛ) + exp(sink))
        output  = Σₛ weightₛ vₛ

    B batch, T queries, S keys, N query heads, K key/value heads (N a multiple of K: query
    head n reads key/value head n // (N/K)), H and D head sizes. The batch may be absent
    or several axes; where an index b is asked for, it counts them in row-major order.

    A query that sees no key, S = 0 included, has output 0 and every gradient 0. NaN or Inf
    in a key or value that is masked out touches nothing, forward or backward. Softmax
    and sums are in float32 at least, in float64 for float64 inputs; products have the
    precision of `jax.default_matmul_precision`, in derivatives too. Every floating input
    has derivatives of every order, arrays inside modifiers too.

    Args:
        query: `BTNH`, one of float16, bfloat16, float32, float64.
        key: `BSKH`, of the same dtype.
        value: `BSKD`, of the same dtype.
        mask: True = may attend: one of `jattn.masks`, a function (b, n, t, s) → bool of
            scalars, or a Boolean array that broadcasts to BNTS; or a `block_table` of one.
            Inside `jax.shard_map` b and n count the examples and heads of one device;
            `jattn.counted.counted_from` gives them their numbers in the whole.
        bias: Added to the logits after the modifier; floating, broadcasts to BNTS.
        modifier: One of `jattn.modifiers` or a function (logit, b, n, t, s) → logit.
        sink: A logit that only takes weight away, one per query head or one for all.
        scale: Multiplies q·k; 1/√H by default.
        query_position: Where the queries stand: the first one's position or each one's, `T`
            or `BT`; 0, 1, … by default. What masks and modifiers see as t.
        key_position: Likewise for the keys: `S` or `BS`; what they see as s.
        dropout: A `jattn.Dropout(rate, rng)`; `shared=True` drops alike in all heads.
        implementation: None chooses; a name runs that one or raises its reason.

    Returns:
        The output, `BTND`, in the dtype of the inputs.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
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
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
        "dropout": dropout,
    }
    problem, operands = pose("attention", query, key, value, **options)
    return _attend("attention", problem, operands, sink, implementation, False).output


@across("BTN. BTN")
def attention_state(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
    implementation=None,
) -> State:
    """Attends like `attention`, and also returns the logsumexp of the logits.

        logsumexp = log Σₛ exp(logitₛ)

    States over disjoint parts of the keys `merge` into the state over all of them. The
    sink and dropout change the output only. To attend in parts with a sink, leave it out
    of the parts and merge `State(0, sink)` in once. A query that sees nothing has
    output 0 and logsumexp −∞.

    Args:
        query: As in `attention`, and so are all others.
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
        implementation: See `attention`.

    Returns:
        A `State`: `output` BTND in the dtype of the inputs, and `logsumexp` BTN in float32
        at least; both differentiable.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.
    """
    options = {
        "mask": mask,
        "bias": bias,
        "modifier": modifier,
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
        "dropout": dropout,
    }
    where = "attention_state"
    problem, operands = pose(where, query, key, value, **options)
    return _attend(where, problem, operands, sink, implementation, True)


@across("BNTS")
def attention_logits(
    query,
    key,
    *,
    mask=None,
    bias=None,
    modifier=None,
    scale=None,
    query_position=None,
    key_position=None,
    rows=None,
) -> jax.Array:
    """Returns the logits that `attention` takes the softmax of.

        logit = modifier(scale · q·k, b, n, t, s) + bias, and −∞ where masked out

    Args:
        query: `BTNH`.
        key: `BSKH`.
        mask: See `attention`.
        bias: See `attention`.
        modifier: See `attention`.
        scale: See `attention`.
        query_position: See `attention`.
        key_position: See `attention`.
        rows: Indices of the queries to look at, integers; all by default.

    Returns:
        The logits, `BNTS`, in float32 at least; T counts the chosen rows.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.
    """
    where = "attention_logits"
    problem, operands = pose(
        where,
        query,
        key,
        key,  # no value is needed, and the keys are sure to fit
        mask=mask,
        bias=bias,
        modifier=modifier,
        scale=scale,
        query_position=query_position,
        key_position=key_position,
    )
    rows = _check_rows(where, rows, problem.sizes)
    problem = dataclasses.replace(problem, named=None)
    return _unflatten(_logits(problem, operands, rows), problem.sizes)


@across("BNTS")
def attention_weights(
    query,
    key,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
    rows=None,
) -> jax.Array:
    """Returns the weights that `attention` multiplies the values with.

    They sum to 1 over S; to less with a sink; to 0 where a query sees nothing.

    Args:
        query: `BTNH`.
        key: `BSKH`.
        mask: See `attention`.
        bias: See `attention`.
        modifier: See `attention`.
        sink: See `attention`.
        scale: See `attention`.
        query_position: See `attention`.
        key_position: See `attention`.
        dropout: See `attention`.
        rows: Indices of the queries to look at, integers; all by default. R rows take
            R × S memory, not T × S.

    Returns:
        The weights, `BNTS`, in float32 at least; T counts the chosen rows.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> attention_weights(query, key, mask=lambda b, n, t, s: t >= s)
        Array([[[1. , 0. ],
                [0.5, 0.5]]], dtype=float32)
    """
    where = "attention_weights"
    problem, operands = pose(
        where,
        query,
        key,
        key,  # no value is needed, and the keys are sure to fit
        mask=mask,
        bias=bias,
        modifier=modifier,
        scale=scale,
        query_position=query_position,
        key_position=key_position,
        dropout=dropout,
    )
    sink = check_sink(where, sink, problem.sizes)
    rows = _check_rows(where, rows, problem.sizes)
    problem = dataclasses.replace(problem, named=None)
    return _unflatten(_weights(problem, operands, sink, rows), problem.sizes)


@across("")
def explain(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
    implementation=None,
    platform=None,
) -> Explanation:
    """Says what `attention` would do with these arguments, without doing it.

    Takes the arguments of `attention`; arrays may be `jax.ShapeDtypeStruct`s, inside masks
    and modifiers too.

    Args:
        query: `BTNH`, an array or its shape and dtype.
        key: `BSKH`, likewise.
        value: `BSKD`, likewise.
        mask: See `attention`.
        bias: See `attention`.
        modifier: See `attention`.
        sink: See `attention`.
        scale: See `attention`.
        query_position: See `attention`.
        key_position: See `attention`.
        dropout: See `attention`.
        implementation: See `attention`.
        platform: Where it would run: `"cpu"`, `"gpu"` or `"tpu"`; by default where JAX
            runs here. That no such device is here does not matter.

    Returns:
        An `Explanation`, which prints as a short table.

    Raises:
        ValueError: As `attention` would.
    """
    options = {
        "mask": mask,
        "bias": bias,
        "modifier": modifier,
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
        "dropout": dropout,
    }
    where, platform = "explain", jax.default_backend() if platform is None else platform
    if platform not in ("cpu", "gpu", "cuda", "rocm", "tpu"):
        raise ValueError(
            f'{where}: `platform` must be "cpu", "gpu" or "tpu", got {platform!r}.'
        )
    leaves, tree = jax.tree.flatten((query, key, value, sink, options))
    is_shape = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    problems = []

    def posed(shapes):
        shapes = iter(shapes)
        filled = [
            next(shapes) if shape else leaf
            for leaf, shape in zip(leaves, is_shape, strict=True)
        ]
        query, key, value, sink, options = tree.unflatten(filled)
        problem, _ = pose(where, query, key, value, **options)
        sink = check_sink(where, sink, problem.sizes)
        problems.append(problem if sink is None else asking_logsumexp(problem))

    shapes = [leaf for leaf, shape in zip(leaves, is_shape, strict=True) if shape]
    jax.eval_shape(posed, shapes)
    (problem,), operands = problems, None
    bias = options["bias"]
    names = ("mask", "modifier", "query_position", "key_position")
    decisive = {name: options[name] for name in names}
    leaves = jax.tree.leaves((decisive, bias))
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        _, operands = pose_mask(where, problem.sizes, problem.dtype, **decisive)
        if bias is not None:
            operands = operands._replace(bias=check_bias(where, bias, problem.sizes))
    return explanation.explain(where, problem, operands, platform, implementation)


def _attend(where, problem, operands, sink, implementation, whole: bool) -> State:
    """Chooses an implementation and runs it; a logsumexp is given where `whole`."""
    sink = check_sink(where, sink, problem.sizes)
    problem = asking_logsumexp(problem) if whole or sink is not None else problem
    name = dispatch.choose(where, problem, jax.default_backend(), implementation)
    names = dispatch.candidates(problem, name, implementation is not None)
    if name != "dense":
        problem = decided(problem, operands)
    # Only cuDNN's programs hold the mask's numbers; others are to share theirs.
    problem = problem if "cudnn" in names else dataclasses.replace(problem, named=None)
    state = _state(problem, names, operands, sink, whole)
    unflatten = lambda x: x.reshape(*problem.sizes.batch, *x.shape[1:])
    return jax.tree.map(unflatten, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _state(problem: Problem, names, operands: Operands, sink, whole: bool) -> State:
    """Runs one of the implementations that have these names.

    Without `whole` the logsumexp is None: the −∞ of a query that sees nothing is no result
    then, which `jax.debug_infs` would report.
    """
    operands, spoil = apart(operands)
    state = dispatch.attention_state(problem, operands, names)
    chex.assert_equal_shape_prefix([operands.query, *state], 3)
    chex.assert_type(state.logsumexp, problem.wide)
    output = with_sink(state, sink).astype(problem.dtype)
    logsumexp: Any = state.logsumexp if whole else None
    return spoil(State(output, logsumexp))


@functools.partial(jax.jit, static_argnums=0)
def _logits(problem: Problem, operands: Operands, rows) -> jax.Array:
    if rows is not None:
        problem, operands = select_rows(problem, operands, rows)
    operands, spoil = apart(operands)
    return spoil(dense.attention_logits(problem, operands))


@functools.partial(jax.jit, static_argnums=0)
def _weights(problem: Problem, operands: Operands, sink, rows) -> jax.Array:
    if rows is not None:
        problem, operands = select_rows(problem, operands, rows)
    operands, spoil = apart(operands)
    weights, logsumexp = dense.attention_weights(problem, operands)
    weights = dense.drop(problem, operands, weights)
    # Here heads come before queries.
    sink = None if sink is None else sink[:, None]
    return spoil(with_sink(State(weights, logsumexp), sink))


def _unflatten(array: jax.Array, sizes: Sizes) -> jax.Array:
    return array.reshape(*sizes.batch, *array.shape[1:])


def _check_rows(where: str, rows, sizes: Sizes):
    if rows is None:
        return None
    rows = check_array(where, "rows", rows)
    rows = rows.astype(jnp.int32) if rows.size == 0 else rows
    if rows.ndim > 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `rows` must be the indices of queries, integers in one axis, got "
            f"{rows.dtype}{list(rows.shape)}."
        )
    if not isinstance(rows, jax.core.Tracer) and rows.size:
        low, high = int(rows.min()), int(rows.max())
        if low < -sizes.T or high >= sizes.T:
            raise ValueError(
                f"{where}: `rows` must be within the T={sizes.T} queries, got {low}…{high}."
            )
    return rows.reshape(-1)
