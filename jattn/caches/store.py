"""Where the keys and values of tokens lie in memory.

A query reads all keys along their heads and all values along their slots. So both products
of a decoding step are rows by a matrix that lies as it is multiplied:

    logits (G, S) = query (G, H) · keys (H, S)          keys    …KHS
    output (G, D) = weights (G, S) · values (S, D)      values  …KSD

On CPU that takes half the time of keys that lie as `BSKH`, for XLA would rearrange those
in each step. `key` and `value` are views in the usual order.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.arrays.checks import check_integers, is_known
from jattn.caches import rounding, write
from jattn.caches.products import Products
from jattn.implementations.tpu.decode.slots import Slots
from jattn.pytree import pytree


@pytree(
    "keys",
    "values",
    "key_scales",
    "value_scales",
    static=("dtype", "head_dim", "value_dim"),
)
class Store(Products):
    """Keys `…KHS` and values `…KSD` in slots; scales `…KS` where they are rounded.

    Without `values`, the first `value_dim` numbers of each key are its value.
    """

    keys: jax.Array
    values: jax.Array | None
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    dtype: str
    head_dim: int
    value_dim: int

    @property
    def batch(self) -> tuple[int, ...]:
        """Gives the axes before the heads."""
        return self.keys.shape[:-3]

    @property
    def num_heads(self) -> int:
        """Gives K."""
        return self.keys.shape[-3]

    @property
    def slots(self) -> int:
        """Gives S."""
        return self.keys.shape[-1]

    @property
    def is_rounded(self) -> bool:
        """Says whether the numbers have scales."""
        return self.key_scales is not None

    @property
    def unit(self) -> int:
        """Says how many slots are cut together."""
        return 1

    def lies_ready(self, wide) -> bool:
        """Says whether all slots can be multiplied where they lie: nothing is widened."""
        return self.keys.dtype == wide

    def arrays(self) -> Slots:
        """Gives the arrays where they lie, as a kernel reads them."""
        return Slots(self.keys, self.values, self.key_scales, self.value_scales)

    def map(self, function: Callable) -> "Store":
        """Applies a function of an array and its axis of slots to each array."""

        def apply(x, axis: int) -> Any:
            return None if x is None else function(x, axis)

        return Store(
            apply(self.keys, -1),
            apply(self.values, -2),
            apply(self.key_scales, -1),
            apply(self.value_scales, -1),
            *(self.dtype, self.head_dim, self.value_dim),
        )

    def flat(self) -> "Store":
        """Gives the same with one batch axis."""
        first, count = len(self.batch), math.prod(self.batch)
        return self.map(lambda x, _: x.reshape(count, *x.shape[first:]))

    def cut(self, start, size: int) -> "Store":
        """Gives the slots from `start` on."""
        if size == self.slots:
            return self
        return self.map(lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis))

    def wide_keys(self, wide) -> list[jax.Array]:
        """Gives the keys as they are multiplied, `…KHS` without scales, in parts of H."""
        if not self.is_rounded:
            return [self.keys.astype(wide)]
        return rounding.numbers_of(self.keys, self.dtype, -2, self.head_dim, wide)

    def wide_values(self, wide) -> list[jax.Array]:
        """Gives the values, `…KSD` in parts of D; more than D where they are the keys.

        To cut the keys would copy them; what is too much is dropped from the product.
        """
        if self.values is None:
            return [jnp.swapaxes(x, -1, -2) for x in self.wide_keys(wide)]
        if not self.is_rounded:
            return [self.values.astype(wide)]
        return rounding.numbers_of(self.values, self.dtype, -1, self.value_dim, wide)

    def scales(self, wide) -> tuple[jax.Array, jax.Array] | None:
        """Gives the scales of keys and values, `…KS`; None where they are exact."""
        if self.key_scales is None:
            return None
        of_values = self.value_scales
        if of_values is None:  # values that are a part of the keys
            of_values = self.key_scales
        return self.key_scales.astype(wide), of_values.astype(wide)

    @functools.partial(jax.jit, static_argnames="dtype")
    def vectors(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Gives the keys `…SKH` and the values `…SKD` in the usual order, scaled."""
        wide = jnp.promote_types(dtype, jnp.float32) if self.is_rounded else dtype
        keys = jnp.concatenate(self.wide_keys(wide), -2)
        values = jnp.concatenate(self.wide_values(wide), -1)[..., : self.value_dim]
        if (scales := self.scales(wide)) is not None:
            keys, values = keys * scales[0][..., None, :], values * scales[1][..., None]
        keys, values = jnp.moveaxis(keys, -1, -3), jnp.moveaxis(values, -2, -3)
        return keys.astype(dtype), values.astype(dtype)

    def exact(self, dtype) -> "Store":
        """Gives a store of the same vectors without scales."""
        keys, values = self.vectors(dtype)
        own = None if self.values is None else jnp.moveaxis(values, -3, -2)
        sizes = jnp.dtype(dtype).name, self.head_dim, self.value_dim
        return Store(jnp.moveaxis(keys, -3, -1), own, None, None, *sizes)


def blank(batch, slots, num_heads, head_dim, value_dim, dtype, shared=False) -> Store:
    """Makes a store of zeros; with `shared`, values are the first numbers of keys."""
    dtype = jnp.dtype(dtype).name
    kind = rounding.stored_type(dtype)
    H, D = (rounding.stored_size(dtype, x) for x in (head_dim, value_dim))
    shape = (*batch, num_heads)
    scales = lambda: jnp.zeros((*shape, slots), jnp.float32)
    is_rounded = rounding.is_rounded(dtype)
    return Store(
        jnp.zeros((*shape, H, slots), kind),
        None if shared else jnp.zeros((*shape, slots, D), kind),
        scales() if is_rounded else None,
        scales() if is_rounded and not shared else None,
        *(dtype, head_dim, value_dim),
    )


@jax.jit  # one program where it is called outside of one
def put_run(store: Store, key, value, start, count) -> Store:
    """Writes the first `count` of T tokens from slot `start` on, in all examples."""
    new = _as_stored(store, key, value)

    def put(array, axis):
        rows = jnp.moveaxis(next(new), len(store.batch), axis)  # …TKH to …KHT and so on
        return write.write_run(array, rows, start, count, axis)

    return store.map(put)


@jax.jit  # one program where it is called outside of one
def put_at(store: Store, key, value, slots) -> Store:
    """Writes each of T tokens of each example into its own slot, BT."""
    new, batch = _as_stored(store, key, value), store.batch
    count = math.prod(batch)  # not −1: no size follows from arrays without numbers
    slots = slots.reshape(count, slots.shape[-1])

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


@jax.jit  # one program where it is called outside of one
def put_pairs(store: Store, key, value, pages, slots) -> Store:
    """Writes each of T tokens of each example into a slot of a page, BT and BT."""
    new = _as_stored(store, key, value)
    put = lambda x, axis: write.write_pairs(
        x, next(new), (pages, slots), (0, x.ndim + axis)
    )
    return store.map(put)


def taken(where: str, store: Store, indices) -> Store:
    """Gives the examples `indices` of a store with one batch axis."""
    indices = check_integers(where, "indices", indices)
    if len(store.batch) != 1 or indices.ndim != 1:
        raise ValueError(
            f"{where}: `indices` must be a list of examples, of a cache with one batch "
            f"axis, got shape {indices.shape} for B = {store.batch}; use `jax.tree.map`."
        )
    B = store.batch[0]
    check_there(where, "indices", indices, B, least=-B)
    return store.map(lambda x, _: jnp.take(x, jnp.asarray(indices), axis=0))


def check_there(where: str, name: str, numbers, B: int, least=-np.inf, or_else="") -> None:
    """Raises where a known number is not that of one of B examples."""
    # Asked of NumPy: inside `jit`, what JAX computes of known numbers is not known.
    if is_known(numbers) and not all(least <= x < B for x in np.ravel(numbers)):
        raise ValueError(
            f"{where}: `{name}` must be less than B = {B}{or_else}, got {numbers}; there "
            f"are no other examples."
        )


def _as_stored(store: Store, key, value) -> Iterator[jax.Array]:
    """Gives what to write as `Store.map` visits the arrays: `…TK` and an axis."""
    vectors = [x for x in (key, value) if x is not None]
    if not store.is_rounded:
        return iter([x.astype(store.keys.dtype) for x in vectors])
    numbers, scales = zip(*(rounding.rounded(x, store.dtype) for x in vectors), strict=True)
    return iter((*numbers, *scales))
