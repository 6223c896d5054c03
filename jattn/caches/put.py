"""Writes the vectors of tokens into a store: one after the other, or each into its slot."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jattn.caches import rounding, write
from jattn.caches.store import Store, blank
from jattn.operations.compiled import compiled


@compiled()
def put_run(store: Store, key, value, start, count) -> Store:
    """Writes the first `count` of T tokens from slot `start` on, in all examples."""
    new = _as_stored(store, key, value)
    count = jnp.minimum(count, store.slots - start)  # what no token has stays 0

    def put(array, axis):
        rows = jnp.moveaxis(next(new), len(store.batch), axis)  # …TKH to …KHT and so on
        return write.write_run(array, rows, start, count, axis)

    return store.map(put)


@compiled()
def put_at(store: Store, key, value, slots) -> Store:
    """Writes each of T tokens of each example into its own slot, BT."""
    new, batch = _as_stored(store, key, value), store.batch
    count = math.prod(batch)  # not −1: no size follows from arrays without numbers
    slots = slots.reshape(count, slots.shape[-1])
    # Dropped: not written where no token is either.
    slots = jnp.where(slots < store.slots, slots, slots + store.more)

    def put(array, axis):
        rows = next(new)
        rows = rows.reshape(count, *rows.shape[len(batch) :])
        flat = array.reshape(count, *array.shape[len(batch) :])
        flat = write.write_at(flat, rows, slots, flat.ndim + axis)
        return flat.reshape(array.shape)

    return store.map(put)


def stored_vectors(store: Store, key, value, dtype) -> tuple[jax.Array, jax.Array]:
    """Gives the keys and values of T tokens, rounded as in the store."""
    T, sizes = key.shape[-3], (store.num_heads, store.head_dim, store.value_dim)
    slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (*store.batch, T))
    alone = blank(store.batch, T, *sizes, store.dtype)
    return put_at(alone, key, value, slots).vectors(dtype)


@compiled()
def put_pairs(store: Store, key, value, pages, slots) -> Store:
    """Writes each of T tokens of each example into a slot of a page, BT and BT."""
    new = _as_stored(store, key, value)
    put = lambda x, axis: write.write_pairs(
        x, next(new), (pages, slots), (0, x.ndim + axis)
    )
    return store.map(put)


def _as_stored(store: Store, key, value) -> Iterator[jax.Array]:
    """Gives what to write as `Store.map` visits the arrays: `…TK` and an axis."""
    vectors = [x for x in (key, value) if x is not None]
    if not store.is_rounded:
        return iter([x.astype(store.keys.dtype) for x in vectors])
    numbers, scales = zip(*(rounding.rounded(x, store.dtype) for x in vectors), strict=True)
    return iter((*numbers, *scales))
