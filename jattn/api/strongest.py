"""The strongest keys of each query."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn.api.views import _pose
from jattn.arrays.checks import check_flag
from jattn.arrays.integers import is_number
from jattn.arrays.meshes import across
from jattn.arrays.shapes import unflatten_batch
from jattn.call.options import WeightOptions
from jattn.call.problem import Problem, apart
from jattn.implementations.blockwise.strongest import strongest
from jattn.implementations.normalize import normalizer
from jattn.operations.compiled import compiled
from jattn.operations.varying import locally


class StrongestKeys(NamedTuple):
    """The keys with the largest weights of each query, the largest first.

    Attributes:
        indices: Where each key is in `key`, int32; −1 where there is none.
        weights: Its weight; 0 where there is none.
    """

    indices: jax.Array
    weights: jax.Array


@across("BTN. BTN.")
def strongest_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int,
    *,
    logsumexp: ArrayLike | None = None,
    average: bool = False,
    **options: Unpack[WeightOptions],
) -> StrongestKeys:
    """Finds the k keys that each query attends to most.

    Among equal weights, the first key comes first. Where fewer than k keys have any
    weight, the remaining entries have index −1 and weight 0; for a query that sees
    nothing, all entries do. A sink takes weight away and is never among the keys. A query
    whose weights are not numbers has indices −1 and weights NaN.

    This function has no derivative; differentiating it raises an error.

    Args:
        query: `BTNH`.
        key: `BSKH`.
        k: How many keys, an integer of Python or NumPy; it may be more than S.
        logsumexp: The logsumexp of the logits, `BTN`, as `attention_state` of the same
            arguments gives it; computed blockwise by default.
        average: Whether to average the weights over heads before the strongest are found.
        **options: The options of `attention` except `dropout`.

    Returns:
        `indices` and `weights`, `BTNk`; or `BTk` for averaged weights.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> indices, weights = strongest_keys(query, key, 2, mask=lambda b, n, t, s: t >= s)
        >>> indices[:, 0], weights[:, 0]
        (Array([[ 0, -1],
               [ 0,  1]], dtype=int32), Array([[1. , 0. ],
               [0.5, 0.5]], dtype=float32))
    """
    where = "strongest_keys"
    # k keys are ranked together with those of a tile, and int32 numbers them all.
    if not is_number(k) or not 1 <= k < 2**30:
        raise ValueError(
            f"{where}: `k` must be a Python integer above 0 and below 2³⁰, got {k!r}; "
            f"give S to find all keys."
        )
    average = check_flag(where, "average", average)
    problem, arrays = _pose(where, query, key, logsumexp, options)
    found = _strongest(problem, int(k), average, arrays)
    return StrongestKeys(*(unflatten_batch(x, problem.sizes) for x in found))


@compiled(static=(0, 1, 2, 4))
def _strongest(problem: Problem, k: int, average: bool, arrays, tile=None):
    return locally(_found, (problem, k, average, tile), _without_derivative(arrays))


def _found(problem: Problem, k: int, average: bool, tile, arrays):
    """Finds the indices and the weights of the strongest keys."""
    operands, spoil = apart(arrays[0])
    rows = normalizer(problem, operands, *arrays[1:])
    indices, weights = strongest(problem, operands, rows, k, average, tile)
    # A normalizer of NaN makes all weights of the query NaN, and no key the strongest.
    unknown = jnp.isnan(spoil(rows.log_total))
    unknown = (jnp.any(unknown, axis=2) if average else unknown)[..., None]
    return jnp.where(unknown, -1, indices), jnp.where(unknown, jnp.nan, weights)


@jax.custom_jvp
def _without_derivative(arrays):
    return arrays


@_without_derivative.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "strongest_keys: has no derivative; give it `jax.lax.stop_gradient` of its inputs, "
        "or differentiate `jattn.attention_weights` with `rows=`."
    )
