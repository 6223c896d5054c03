"""A look at weights of any length: the strongest keys, entropy, what each key receives.

Each view says something of all T × S weights without ever holding them: they are computed
tile by tile from query, key and logsumexp, in memory linear in T and S, and blocks that
the mask leaves empty are skipped. All take the options of `jattn.attention_weights` but
dropout: what is looked at is the weights before any of them drop.
"""

import dataclasses
import functools
import warnings
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn.call.options import WeightOptions, checked
from jattn.call.problem import Operands, Problem, apart, check_sink, pose
from jattn.implementations.attention import attention_state
from jattn.implementations.blockwise import summaries
from jattn.implementations.blockwise.plan import decided
from jattn.implementations.blockwise.strongest import strongest
from jattn.meshes import across
from jattn.operations.varying import locally
from jattn.shapes import check_array, flatten_batch

__all__ = ["StrongestKeys", "attention_entropy", "attention_received", "strongest_keys"]


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

    Of equal weights the first key comes first. Where fewer than k keys have any weight,
    the rest has index −1 and weight 0; so has a query that sees nothing. A sink takes
    weight away and is never among the keys. A query whose weights are not numbers has
    indices −1 and weights NaN.

    It has no derivative and says so when it is asked for one.

    Args:
        query: `BTNH`.
        key: `BSKH`.
        k: How many keys, a Python integer; it may be more than S.
        logsumexp: Of the logits, `BTN`, as `attention_state` of the same arguments gives
            it; computed blockwise by default.
        average: Whether to take the strongest of the weights averaged over heads.
        **options: Those of `attention` but `dropout`.

    Returns:
        `indices` and `weights`, `BTNk`; or `BTk` of averaged weights.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> indices, weights = strongest_keys(query, key, 2, mask=lambda b, n, t, s: t >= s)
        >>> indices[:, 0], weights[:, 0]
        (Array([[ 0, -1],
               [ 0,  1]], dtype=int32), Array([[1. , 0. ],
               [0.5, 0.5]], dtype=float32))
    """
    where = "strongest_keys"
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{where}: `k` must be a Python integer above 0, got {k!r}.")
    problem, arrays = _pose(where, query, key, logsumexp, options)
    found = _strongest(problem, k, bool(average), arrays)
    return StrongestKeys(*(_unflatten(x, problem) for x in found))


@across("BTN")
def attention_entropy(
    query: ArrayLike,
    key: ArrayLike,
    *,
    logsumexp: ArrayLike | None = None,
    average: bool = False,
    **options: Unpack[WeightOptions],
) -> jax.Array:
    """Says over how many keys each query spreads: the entropy of its weights.

        entropy = −Σₛ weightₛ log weightₛ        in nats

    It is 0 for a query that attends to one key, or sees nothing, and log S for one that
    attends to all S keys alike. The sink counts as one more key, so that the weights add
    up to 1. Differentiable to any order, also in a given logsumexp.

    Args:
        query: See `strongest_keys`, and so are all others.
        key: See `strongest_keys`.
        logsumexp: See `strongest_keys`.
        average: Takes the mean over heads. Deprecated: write `.mean(-1)` instead.
        **options: Those of `attention` but `dropout`.

    Returns:
        The entropy, `BTN`, in float32 at least; or its mean over heads, `BT`.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
        >>> query, key = jnp.zeros((3, 1, 4)), jnp.zeros((3, 1, 4))
        >>> jnp.exp(attention_entropy(query, key, mask=lambda b, n, t, s: t >= s))
        Array([[1.],
               [2.],
               [3.]], dtype=float32)

    Reference:
        Zhai et al., 2023, arXiv:2303.06296: it collapses before training diverges.
    """
    _warn_of("attention_entropy", average)
    problem, arrays = _pose("attention_entropy", query, key, logsumexp, options)
    return _unflatten(_entropy(problem, bool(average), arrays), problem)


@across("BSN")
def attention_received(
    query: ArrayLike,
    key: ArrayLike,
    *,
    logsumexp: ArrayLike | None = None,
    average: bool = False,
    **options: Unpack[WeightOptions],
) -> jax.Array:
    """Says how much attention each key gets: the sum of its weights over all queries.

        receivedₛ = Σₜ weightₜₛ

    Over all keys this adds up to the number of queries that see something, less what
    goes to the sink. A key that no query sees receives 0. Differentiable to any order,
    also in a given logsumexp.

    Args:
        query: See `strongest_keys`, and so are all others.
        key: See `strongest_keys`.
        logsumexp: See `strongest_keys`.
        average: Takes the mean over heads. Deprecated: write `.mean(-1)` instead.
        **options: Those of `attention` but `dropout`.

    Returns:
        What each key receives from each query head, `BSN`, in float32 at least; or the
        mean over heads, `BS`.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> attention_received(query, key, mask=lambda b, n, t, s: t >= s)
        Array([[1.5],
               [0.5]], dtype=float32)
    """
    _warn_of("attention_received", average)
    problem, arrays = _pose("attention_received", query, key, logsumexp, options)
    return _unflatten(_received(problem, bool(average), arrays), problem)


def _warn_of(where: str, average: bool) -> None:
    """Warns of an argument that will go: it changes the rank, which `.mean(-1)` says."""
    if average:
        warnings.warn(
            f"{where}: `average=True` will go in the next version; write `.mean(-1)`.",
            DeprecationWarning,
            stacklevel=4,  # past this function, the view, and what takes it across meshes
        )


def _pose(where, query, key, logsumexp, options):
    """The problem; and its operands, the sink and the logsumexp."""
    given = checked(where, options, WeightOptions)
    sink = given.pop("sink", None)
    problem, operands = pose(where, query, key, key, **given)
    sizes = problem.sizes
    # No value is needed: one of size 0 makes the logsumexp cheap.
    problem = decided(problem, operands)
    sizes_without = dataclasses.replace(sizes, D=0)
    problem = dataclasses.replace(problem, sizes=sizes_without, named=None)
    operands = operands._replace(value=operands.value[..., :0])
    if logsumexp is not None:
        logsumexp = check_array(where, "logsumexp", logsumexp)
        expected = (*sizes.batch, sizes.T, sizes.N)
        floating = jnp.issubdtype(logsumexp.dtype, jnp.floating)
        if logsumexp.shape != expected or not floating:
            raise ValueError(
                f"{where}: `logsumexp` must be BTN = {expected} and floating, got "
                f"{logsumexp.dtype}{list(logsumexp.shape)}; take it from "
                f"`jattn.attention_state` of the same arguments."
            )
        logsumexp = flatten_batch(logsumexp, sizes).astype(problem.wide)
    return problem, (operands, check_sink(where, sink, sizes), logsumexp)


def _normalizer(problem: Problem, operands: Operands, sink, logsumexp):
    """The logarithm of what weights are divided by, BTN; −∞ where nothing is seen."""
    if logsumexp is None:
        logsumexp = attention_state(problem, operands).logsumexp
    if sink is None:
        return logsumexp
    sink = jnp.broadcast_to(sink.astype(problem.wide), logsumexp.shape)
    return jnp.logaddexp(logsumexp, sink)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _entropy(problem: Problem, average: bool, arrays, tile=None):
    operands, spoil = apart(arrays[0])
    _, sink, logsumexp = arrays
    normalizer = _normalizer(problem, operands, sink, logsumexp)
    entropy = summaries.entropy(problem, operands, summaries.closed(normalizer), tile)
    if sink is not None:
        sink = jnp.broadcast_to(sink.astype(problem.wide), normalizer.shape)
        entropy += summaries.surprise(sink - summaries.closed(normalizer))
    return spoil(jnp.mean(entropy, axis=2) if average else entropy)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _received(problem: Problem, average: bool, arrays, tile=None):
    operands, spoil = apart(arrays[0])
    normalizer = summaries.closed(_normalizer(problem, operands, *arrays[1:]))
    received = summaries.received(problem, operands, normalizer, tile)
    return spoil(jnp.mean(received, axis=2) if average else received)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _strongest(problem: Problem, k: int, average: bool, arrays, tile=None):
    return locally(_found, (problem, k, average, tile), _without_derivative(arrays))


def _found(problem: Problem, k: int, average: bool, tile, arrays):
    """The indices and the weights of the strongest keys."""
    operands, spoil = apart(arrays[0])
    normalizer = summaries.closed(_normalizer(problem, operands, *arrays[1:]))
    indices, weights = strongest(problem, operands, normalizer, k, average, tile)
    unknown = jnp.isnan(spoil(normalizer))
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


def _unflatten(array: jax.Array, problem: Problem) -> jax.Array:
    return array.reshape(*problem.sizes.batch, *array.shape[1:])
