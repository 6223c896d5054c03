"""Sums over weights of any length: their entropy, and what each key receives.

Each view says something about all T × S weights without holding them at once. They are
computed tile by tile from query, key and logsumexp, in memory linear in T and S, and
blocks that the mask leaves empty are skipped. All views take the options of
`jattn.attention_weights` except dropout, because they describe the weights before dropout.
"""

import dataclasses
import functools
import warnings
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn.arrays.checks import check_array, check_flag
from jattn.arrays.meshes import across
from jattn.arrays.shapes import flatten_batch, unflatten_batch
from jattn.call.options import WeightOptions, checked
from jattn.call.pose import check_sink, pose
from jattn.call.problem import Operands, Problem, apart, with_wide_vectors
from jattn.implementations import summaries
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.surprise import surprise_of_largest

__all__ = ["attention_entropy", "attention_received"]


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

    It is 0 for a query that attends to one key or sees nothing, and log S for a query that
    attends to all S keys alike. The sink counts as one more key, so that the weights add
    up to 1. Differentiable to any order, also in a given logsumexp; but the rounding of a
    given one is an error of the entropy, seen where one key has nearly all the weight.

    Args:
        query: See `strongest_keys`.
        key: See `strongest_keys`.
        logsumexp: See `strongest_keys`.
        average: Takes the mean over heads. Deprecated: write `.mean(-1)` instead.
        **options: The options of `attention` except `dropout`.

    Returns:
        The entropy, `BTN`, in float32 at least; or its mean over heads, `BT`.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

    Example:
        >>> query, key = jnp.zeros((3, 1, 4)), jnp.zeros((3, 1, 4))
        >>> jnp.exp(attention_entropy(query, key, mask=lambda b, n, t, s: t >= s))
        Array([[1.],
               [2.],
               [3.]], dtype=float32)

    Reference:
        Zhai et al., 2023, arXiv:2303.06296: the entropy collapses before training diverges.
    """
    average = _checked("attention_entropy", average)
    problem, arrays = _pose("attention_entropy", query, key, logsumexp, options)
    return unflatten_batch(_entropy(problem, average, arrays), problem.sizes)


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

    Summed over all keys, this is the number of queries that see something, minus the
    weight that goes to the sink. A key that no query sees receives 0. Differentiable to
    any order, also in a given logsumexp.

    Args:
        query: See `strongest_keys`.
        key: See `strongest_keys`.
        logsumexp: See `strongest_keys`.
        average: Takes the mean over heads. Deprecated: write `.mean(-1)` instead.
        **options: The options of `attention` except `dropout`.

    Returns:
        What each key receives from each query head, `BSN`, in float32 at least; or the
        mean over heads, `BS`.

    Raises:
        ValueError: If an argument does not fit; the message says which, and what to do.

    Example:
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4))
        >>> attention_received(query, key, mask=lambda b, n, t, s: t >= s)
        Array([[1.5],
               [0.5]], dtype=float32)
    """
    average = _checked("attention_received", average)
    problem, arrays = _pose("attention_received", query, key, logsumexp, options)
    return unflatten_batch(_received(problem, average, arrays), problem.sizes)


def _checked(where: str, average) -> bool:
    """Checks `average`, and warns of it: it will go, for `.mean(-1)` does the same."""
    average = check_flag(where, "average", average)
    if average:
        warnings.warn(
            f"{where}: `average=True` will go in the next version; write `.mean(-1)`.",
            DeprecationWarning,
            stacklevel=4,  # the caller of the view: past this, the view, and `across`
        )
    return average


def _pose(where, query, key, logsumexp, options):
    """Gives the problem, and the arrays: its operands, the sink and the logsumexp."""
    given = checked(where, options, WeightOptions)
    sink = given.pop("sink", None)
    problem, operands = pose(where, query, key, key, **given)
    sizes = problem.sizes
    # The weights do not depend on the values. Values of size D = 0 make the logsumexp
    # cheap.
    sizes_without = dataclasses.replace(sizes, D=0)
    problem = dataclasses.replace(problem, sizes=sizes_without)
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


def _read_twice(problem: Problem, operands: Operands, tile):
    """Gives a call whose logits a view computes twice, in the wide precision.

    Once for the normalizer, and once for the sums of the weights.
    """
    if problem.sizes.are_nothing:
        return problem, operands
    operands = with_wide_vectors(problem, operands)
    return prepare(dataclasses.replace(problem, dtype=problem.wide), operands, tile)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _entropy(problem: Problem, average: bool, arrays, tile=None):
    operands, spoil = apart(arrays[0])
    problem, operands = _read_twice(problem, operands, tile)
    _, sink, logsumexp = arrays
    sums = summaries.entropy(problem, operands, sink, logsumexp, tile)
    entropy = sums.surprise
    if logsumexp is None:
        entropy += surprise_of_largest(sums.weight)
    return spoil(jnp.mean(entropy, axis=2) if average else entropy)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _received(problem: Problem, average: bool, arrays, tile=None):
    operands, spoil = apart(arrays[0])
    problem, operands = _read_twice(problem, operands, tile)
    _, sink, logsumexp = arrays
    received = summaries.received(problem, operands, sink, logsumexp, tile)
    return spoil(jnp.mean(received, axis=2) if average else received)
