"""What is asked of a cache: its queries and options, checked and taken apart.

The keys of a call lie in a store, and to give them to `pose` would put all of them in
another order first. So the query and what belongs to it are posed with one key in their
place, and masks, modifiers and biases, which lie along the slots, with sizes alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import check_array, check_integers, is_known, saturate
from jattn.arrays.shapes import Sizes, wide_dtype
from jattn.blocks.block_table import BlockTable
from jattn.call.options import Options
from jattn.call.pose import check_bias, pose, pose_mask
from jattn.call.problem import Operands, Problem, asking_logsumexp, drawn, index
from jattn.masks import Explicit, Lengths, Mask, Segments, as_mask
from jattn.modifiers import Bias

OPTIONS = (*Options.__annotations__, "implementation")


def posed(where: str, query, sizes: Sizes, options) -> tuple[Problem, Operands]:
    """Gives the call without keys and values; what lies along these has `sizes.S` slots."""
    wide = wide_dtype(query.dtype)
    one = (*sizes.batch, 1, sizes.K)
    key, value = (jnp.zeros((*one, size), query.dtype) for size in (sizes.H, sizes.D))
    of_query = {name: options.get(name) for name in ("scale", "dropout")}
    alone, with_query = pose(where, query, key, value, **of_query)
    names = ("mask", "modifier", "query_position", "key_position")
    of_pairs = {name: options.get(name) for name in names}
    problem, operands = pose_mask(where, sizes, query.dtype, **of_pairs)
    bias = options.get("bias")
    kept = ("rate", "shared", "precision")
    facts = {name: getattr(alone, name) for name in kept}
    problem = dataclasses.replace(asking_logsumexp(problem), **facts)
    operands = operands._replace(
        query=with_query.query,
        scale=with_query.scale,
        bias=None if bias is None else check_bias(where, bias, sizes).astype(wide),
        rng=with_query.rng,
    )
    if operands.rng is not None:
        operands = operands._replace(rng=drawn(problem, operands, index(problem, operands)))
    return problem, operands


def mask_of(where: str, options, seen: Mask) -> Mask:
    """Gives the mask of a call together with what is there to be seen."""
    mask = _own_mask(where, options)
    return seen if mask is None else seen & mask


def _own_mask(where: str, options) -> Mask | None:
    """Gives the mask that was given, without the blocks of a table: slots have others."""
    mask = options.get("mask")
    mask = mask.mask if isinstance(mask, BlockTable) else mask
    return None if mask is None else as_mask(mask, where)


def check_options(where: str, options) -> None:
    """Raises for a word that `jattn.attention` does not know."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"{where}: options must be those of `jattn.attention`, got `{unknown[0]}`; "
            f"there are {', '.join(OPTIONS)}."
        )


def check_query(where: str, query, batch, store, dtype=None) -> jax.Array:
    """Checks that a query `BTNH` fits the tokens of a store, and gives it."""
    query = check_array(where, "query", query)
    K, H = store.num_heads, store.head_dim
    fits = query.ndim == len(batch) + 3 and query.shape[: len(batch)] == batch
    if not fits or query.shape[-1] != H:
        raise ValueError(
            f"{where}: `query` must have shape BTNH with B = {batch} and H = {H} of the "
            f"cache, got {query.shape}; give it the batch and head size of the cache."
        )
    if K == 0 or query.shape[-2] % K:
        raise ValueError(
            f"{where}: `query` must have a multiple of K = {K} heads, got {query.shape} = "
            f"BTNH; the cache was made with num_kv_heads={K}."
        )
    if not jnp.issubdtype(query.dtype, jnp.floating) or (
        not store.is_rounded and query.dtype != store.dtype
    ):
        raise ValueError(
            f"{where}: `query` must have the dtype of the cache, {store.dtype}, got "
            f"{query.dtype}; convert one, or make the cache with that dtype."
        )
    return query


def check_rows(where: str, query, T: int, one: bool = False) -> None:
    """Raises for more queries than tokens; with `one`, for any number but 1 and T.

    Queries stand at the last tokens that are appended, so that more have no place.
    """
    rows = jnp.shape(query)[-3:-2]
    if rows and (rows[0] > T or (one and rows[0] not in (1, T))):
        cure = "one for each token, or one for the last" if one else "no more than tokens"
        raise ValueError(
            f"{where}: `query` must have T = {T} queries, {cure}, got {rows[0]}; give each "
            f"query its token."
        )


def check_tokens(where: str, store, *, batch=None, **tokens) -> list[jax.Array]:
    """Keys `BTKH` and values `BTKD` that fit a store, and each other.

    Args:
        where: The public function.
        store: Where they are to go.
        batch: The axes of examples; those of the store by default.
        **tokens: Each array and its last axis, by the array's name.
    """
    checked, batch = [], store.batch if batch is None else batch
    for name, (array, shape) in tokens.items():
        array = check_array(where, name, array)
        want = (*batch, "T", *shape)
        fits = array.ndim == len(want) and all(
            x in ("T", y) for x, y in zip(want, array.shape, strict=True)
        )
        fits = fits and array.shape[len(batch)] == (checked or [array])[0].shape[len(batch)]
        if not fits:
            shown = ", ".join(map(str, want))
            raise ValueError(
                f"{where}: `{name}` must have shape ({shown}), with one T for all, got "
                f"{array.shape}; give it the batch, heads and sizes of the cache."
            )
        known = store.is_rounded and jnp.issubdtype(array.dtype, jnp.floating)
        if not known and array.dtype != store.dtype:
            raise ValueError(
                f"{where}: `{name}` must have the dtype of the cache, {store.dtype}, got "
                f"{array.dtype}; convert it, or make the cache with that dtype."
            )
        checked.append(array)
    return checked


def check_count(where: str, count, shape: tuple[int, ...], T: int):
    """Says how many of T tokens count: an int32 of `shape`, or one; T for None.

    A number beyond T is refused where it is known, and else taken for T.
    """
    if count is None:
        return T
    count = check_integers(where, "count", count)
    if count.shape not in ((), shape):
        cure = "one number for all" if shape == () else "one number, or one of each example"
        hint = "; `ragged=True` makes a cache with a length of each" if shape == () else ""
        raise ValueError(
            f"{where}: `count` must have shape {shape or '()'}, {cure}, got "
            f"{count.shape}{hint}."
        )
    # Asked of NumPy: inside `jit`, what JAX computes of known numbers is not known.
    if is_known(count) and not all(0 <= x <= T for x in np.ravel(count)):
        raise ValueError(
            f"{where}: `count` must be between 0 and the T = {T} tokens that were given, "
            f"got {count}; give more tokens, or count fewer."
        )
    return jnp.clip(saturate(jnp.asarray(count)), 0, T)


def check_whole(
    where: str, name: str, value, shape: tuple[int, ...] | None, least: int | None = None
) -> jax.Array:
    """Checks whole numbers: int32, one of each of `shape`; of any shape for None.

    A known number below `least` is refused.
    """
    value = check_integers(where, name, value)
    # Asked of NumPy, as in `check_count`.
    if least is not None and is_known(value) and np.any(np.asarray(value) < least):
        raise ValueError(
            f"{where}: `{name}` must be at least {least}, got {value}; count the tokens "
            f"from the first one."
        )
    value = saturate(jnp.asarray(value))
    if shape is None:
        return value
    if value.shape not in ((), shape):
        raise ValueError(
            f"{where}: `{name}` must have shape () or {shape}, got {value.shape}; give one "
            f"number for all or one of each example."
        )
    return jnp.broadcast_to(value, shape)


def by_position(where: str, options) -> dict[str, Any]:
    """Gives the options of a call whose slots hold tokens in another order than theirs.

    Raises:
        ValueError: For what lies along the slots, and for positions of one's own.
    """
    check_options(where, options)
    for name in ("bias", "query_position", "key_position"):
        if options.get(name) is not None:
            raise ValueError(
                f"{where}: `{name}` must not be given here, where slots do not hold tokens "
                f"in their order; use a function of positions."
            )
    mask = _own_mask(where, options)
    _check_pointwise(where, mask, options.get("modifier"))
    return options | {"mask": mask}


def _check_pointwise(where: str, mask, modifier) -> None:
    """Raises for a mask or modifier that reads arrays by row and column."""
    kinds = Explicit, Segments, Lengths, Bias
    parts = jax.tree.leaves((mask, modifier), is_leaf=lambda x: isinstance(x, kinds))
    for part in parts:
        if isinstance(part, kinds):
            raise ValueError(
                f"{where}: `{type(part).__name__}` lies along slots, not tokens, and these "
                f"are not in order here; use a function of positions."
            )


def of_each(number, batch: tuple[int, ...]) -> jax.Array:
    """Gives one number of each example, from one for all or for the first axes."""
    number = jnp.asarray(number, jnp.int32)
    missing = len(batch) - number.ndim
    return jnp.broadcast_to(number.reshape(*number.shape, *[1] * missing), batch)
