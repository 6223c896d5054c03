"""The logits and the weights in full, T × S of them, or in some rows."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn.arrays.checks import check_array, saturate
from jattn.arrays.meshes import across
from jattn.arrays.shapes import Sizes, unflatten_batch
from jattn.call.options import LogitOptions, Options, checked
from jattn.call.pose import check_sink, pose
from jattn.call.problem import Operands, Problem, apart, select_rows
from jattn.implementations import dense
from jattn.implementations.sums import Sums, with_sink
from jattn.operations.compiled import compiled

__all__ = ["attention_logits", "attention_weights"]


@across("BNTS")
def attention_logits(
    query: ArrayLike,
    key: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    **options: Unpack[LogitOptions],
) -> jax.Array:
    """Returns the logits that `attention` takes the softmax of.

        logit = modifier(scale · q·k, b, n, t, s) + bias, and −∞ where masked out

    Args:
        query: `BTNH`.
        key: `BSKH`.
        rows: Indices of the queries to look at, integers; all by default.
        **options: The options of `attention` except `sink` and `dropout`.

    Returns:
        The logits, `BNTS`, in float32 at least; T counts the chosen rows.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.
    """
    where = "attention_logits"
    given = checked(where, options, LogitOptions)
    # The values are not used, so the keys, which always fit, stand in for them.
    problem, operands = pose(where, query, key, key, **given)
    rows = _check_rows(where, rows, problem.sizes)
    return unflatten_batch(_logits(problem, operands, rows), problem.sizes)


@across("BNTS")
def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns the weights that `attention` multiplies the values with.

    They sum to 1 over S; to less than 1 with a sink; to 0 where a query sees nothing.

    Args:
        query: `BTNH`.
        key: `BSKH`.
        rows: Indices of the queries to look at, integers; all by default. R rows take
            R × S memory, not T × S.
        **options: The options of `attention`.

    Returns:
        The weights, `BNTS`, in float32 at least; T counts the chosen rows.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> attention_weights(query, key, mask=lambda b, n, t, s: t >= s)
        Array([[[1. , 0. ],
                [0.5, 0.5]]], dtype=float32)
    """
    where = "attention_weights"
    given = checked(where, options, Options)
    sink = given.pop("sink", None)
    # The values are not used, so the keys, which always fit, stand in for them.
    problem, operands = pose(where, query, key, key, **given)
    sink = check_sink(where, sink, problem.sizes)
    rows = _check_rows(where, rows, problem.sizes)
    return unflatten_batch(_weights(problem, operands, sink, rows), problem.sizes)


@compiled(static=(0,))
def _logits(problem: Problem, operands: Operands, rows) -> jax.Array:
    if rows is not None:
        problem, operands = select_rows(problem, operands, rows)
    operands, spoil = apart(operands)
    return spoil(dense.attention_logits(problem, operands))


@compiled(static=(0,))
def _weights(problem: Problem, operands: Operands, sink, rows) -> jax.Array:
    if rows is not None:
        problem, operands = select_rows(problem, operands, rows)
    operands, spoil = apart(operands)
    weights, top, total = dense.attention_weights(problem, operands)
    weights = dense.drop(problem, operands, weights)
    # The weights are BNTS: heads come before queries, so the sink of each head is N1.
    sink = None if sink is None else sink[:, None]
    return spoil(with_sink(Sums(weights, top, total), sink))


def _check_rows(where: str, rows, sizes: Sizes):
    if rows is None:
        return None
    rows = check_array(where, "rows", rows)
    # An empty list becomes an array of floats; it holds no index that could be wrong.
    rows = rows.astype(jnp.int32) if rows.size == 0 else rows
    if rows.ndim > 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `rows` must be the indices of queries, integers in one axis, got "
            f"{rows.dtype}{list(rows.shape)}; give a list of integers."
        )
    if not isinstance(rows, jax.core.Tracer) and rows.size:
        # Asked of NumPy: inside `jit`, what JAX computes of known numbers is not known.
        known = np.asarray(rows)
        low, high = int(known.min()), int(known.max())
        if low < -sizes.T or high >= sizes.T:
            raise ValueError(
                f"{where}: `rows` must be within the T={sizes.T} queries, got {low}…"
                f"{high}; count them from 0, or back from −1."
            )
    # JAX counts −1 from the end in the type of the index, and 300 wraps around in int8.
    return saturate(rows).reshape(-1)
