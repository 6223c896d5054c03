"""Where the keys and values of tokens lie in memory.

A query reads all keys along their heads and all values along their slots. So both products
of a decoding step are rows by a matrix that lies as it is multiplied:

    logits (G, S) = query (G, H) · keys (H, S)          keys    …KHS
    output (G, D) = weights (G, S) · values (S, D)      values  …KSD

On CPU that takes half the time of keys that lie as `BSKH`, for XLA would rearrange those
in each step. `key` and `value` are views in the usual order.

To append writes one number into each row of the keys. So that these do not share a few sets
of the processor's cache, rows are an odd number of cache lines apart there, see `_more`:
there may be more slots than tokens have, and these hold nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.arrays.checks import check_integers, is_known
from jattn.arrays.shapes import FLOATS, wide_dtype
from jattn.caches import rounding
from jattn.caches.products import Products
from jattn.caches.sizes import check_dtype
from jattn.implementations.source import longer
from jattn.implementations.tpu.decode.slots import Slots
from jattn.pytree import pytree


@pytree(
    "keys",
    "values",
    "key_scales",
    "value_scales",
    static=("dtype", "head_dim", "value_dim", "more"),
)
class Store(Products):
    """Keys `…KHS` and values `…KSD` in slots; scales `…KS` where they are rounded.

    Without `values`, the first `value_dim` numbers of each key are its value. The arrays
    have `more` slots at their end, which no token has.
    """

    keys: jax.Array
    values: jax.Array | None
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    dtype: str
    head_dim: int
    value_dim: int
    more: int = 0

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
        return self.keys.shape[-1] - self.more

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
        x = self.cut(0, self.slots)
        return Slots(x.keys, x.values, x.key_scales, x.value_scales)

    def map(self, function: Callable) -> "Store":
        """Applies a function of an array and its axis of slots to each array."""

        def apply(x, axis: int) -> Any:
            return None if x is None else function(x, axis)

        return Store(
            apply(self.keys, -1),
            apply(self.values, -2),
            apply(self.key_scales, -1),
            apply(self.value_scales, -1),
            *(self.dtype, self.head_dim, self.value_dim, self.more),
        )

    def flat(self) -> "Store":
        """Gives the same with one batch axis."""
        first, count = len(self.batch), math.prod(self.batch)
        return self.map(lambda x, _: x.reshape(count, *x.shape[first:]))

    def cut(self, start, size: int) -> "Store":
        """Gives the slots from `start` on."""
        if size == self.keys.shape[-1]:
            return self
        part = self.map(lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis))
        return dataclasses.replace(part, more=0)

    def longer(self, more: int) -> "Store":
        """Gives the same with more slots at the end, which no token has."""
        add = lambda x, axis: longer(x, x.shape[axis] + more, axis=axis)
        return dataclasses.replace(self.map(add), more=self.more + more)

    def whole(self) -> "Store":
        """Gives all slots where they lie, with those that no token has."""
        return dataclasses.replace(self, more=0)

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
        wide = wide_dtype(dtype) if self.is_rounded else dtype
        keys = jnp.concatenate(self.wide_keys(wide), -2)
        values = jnp.concatenate(self.wide_values(wide), -1)[..., : self.value_dim]
        if (scales := self.scales(wide)) is not None:
            keys, values = keys * scales[0][..., None, :], values * scales[1][..., None]
        keys, values = keys[..., : self.slots], values[..., : self.slots, :]
        keys, values = jnp.moveaxis(keys, -1, -3), jnp.moveaxis(values, -2, -3)
        return keys.astype(dtype), values.astype(dtype)

    def exact(self, dtype, apart: bool = False) -> "Store":
        """Gives a store of the same vectors without scales; for `apart` see `blank`."""
        dtype = check_dtype("caches.dequantize", dtype, FLOATS)
        keys, values = self.vectors(dtype)
        keys = jnp.moveaxis(keys, -3, -1)
        own = None if self.values is None else jnp.moveaxis(values, -3, -2)
        sizes = dtype, self.head_dim, self.value_dim
        exact = Store(keys, own, None, None, *sizes)
        apart = apart and own is not None  # keys that are values have no more
        return exact.longer(_more(self.slots, dtype) if apart else 0)


def blank(
    batch, slots, num_heads, head_dim, value_dim, dtype, shared=False, apart=False
) -> Store:
    """Makes a store of zeros.

    With `shared`, values are the first numbers of keys; with `apart`, the rows of keys lie
    so that one token after the other is written fast.
    """
    dtype = jnp.dtype(dtype).name
    kind = rounding.stored_type(dtype)
    more = _more(slots, kind) if apart else 0
    H, D = (rounding.stored_size(dtype, x) for x in (head_dim, value_dim))
    shape, length = (*batch, num_heads), slots + more
    scales = lambda: jnp.zeros((*shape, length), jnp.float32)
    is_rounded = rounding.is_rounded(dtype)
    return Store(
        jnp.zeros((*shape, H, length), kind),
        None if shared else jnp.zeros((*shape, length, D), kind),
        scales() if is_rounded else None,
        scales() if is_rounded and not shared else None,
        *(dtype, head_dim, value_dim, more),
    )


def _more(slots: int, kind) -> int:
    """Says how many slots to add, so that long rows of keys are an odd number of lines.

    The lines of a column then lie in all sets of the processor's cache. With rows of 2ᵏ
    lines they share a few sets and push each other out: to append took 3 to 12 times as
    long on Zen 5 where rows had 1 kB or more.
    """
    size, line = jnp.dtype(kind).itemsize * slots, 64  # bytes of a line of the cache
    if jax.default_backend() != "cpu" or size < 1024 or size % (2 * line):
        return 0
    return line // jnp.dtype(kind).itemsize


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
