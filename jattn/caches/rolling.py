"""A rolling cache: the last tokens in a ring, and the first few.

For masks that look back a window of tokens, and perhaps at the first ones, the sinks: its
memory does not grow with the sequence. Where a token lies is arithmetic of its position p:

    p < sinks     slot p, for ever
    p ≥ sinks     slot sinks + (p − sinks) mod window

A prompt may be longer than the window. Its queries see the slots as they were before it,
and its own tokens as they came, and the sums of both are combined. Only then is the ring
written. So no token is overwritten before all queries that may see it have seen it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.api.attention import attended
from jattn.arrays.meshes import methods_across
from jattn.arrays.shapes import wide_dtype
from jattn.caches import asked, attend, put
from jattn.caches.asked import of_each
from jattn.caches.sizes import batch_axes, check_sizes, check_vectors, no_tokens
from jattn.caches.store import Store, blank, taken
from jattn.call.pose import check_sink
from jattn.implementations.sums import Form, combined, with_sink
from jattn.masks import Mask, Pointwise
from jattn.pytree import pytree


@pytree("store", "length", static=("window", "sinks"))
@methods_across
class RollingCache:
    """The last `window` tokens and the first `sinks`; `rolling` makes one.

    It stands for all tokens that were appended, under the mask

        (t ≥ s) & ((t − s < window) | (s < sinks))    and the one that is given

    Attributes:
        store: The vectors, in slots.
        length: How many tokens were appended: one number, or one of each example.
        window: How many keys a query sees, its own included.
        sinks: How many of the first keys every query sees besides.
    """

    store: Store
    length: jax.Array
    window: int
    sinks: int

    @property
    def batch(self) -> tuple[int, ...]:
        """Gives the axes of examples."""
        return self.store.batch

    @property
    def capacity(self) -> int:
        """Says how many tokens are kept."""
        return self.store.slots

    @property
    def key_position(self) -> jax.Array:
        """Gives the token in each slot, `S` or `BS`; −1 where there is none yet."""
        slot = jnp.arange(self.capacity, dtype=jnp.int32)
        slot = slot.reshape(*[1] * self.length.ndim, -1)
        length = self.length[..., None]
        behind = jnp.mod(length - 1 - slot, self.window)  # of the ring's last token
        in_ring = length - 1 - behind
        token = jnp.where(slot < self.sinks, slot, in_ring)
        present = jnp.where(slot < self.sinks, slot < length, in_ring >= self.sinks)
        return jnp.where(present, token, -1)

    def append(self, key, value, *, count=None) -> "RollingCache":
        """Adds T tokens, of each example only the first `count`; see `Cache.append`."""
        key, value, count = self._checked("append", key, value, count)
        return self._appended(key, value, count)

    def attend(self, query, *, count=None, **options) -> jax.Array:
        """Attends from one query that stands at the last token; see `Cache.attend`.

        More queries have to see keys that their own tokens may have overwritten: `extend`.
        """
        where = "caches.attend"
        query = asked.check_query(where, query, self.batch, self.store)
        if (T := query.shape[-3]) > 1:
            raise ValueError(
                f"{where}: {T} queries of a rolling cache must see {self.window} keys "
                f"each, but it holds {self.window}; use `extend`."
            )
        rows = self._count(where, count, T)
        options = asked.by_position(where, options)
        return self._last(query, rows, options)

    def extend(self, query, key, value, *, count=None, **options):
        """Appends T tokens and attends from them, T of any size; see `Cache.extend`.

        Args:
            query: `BTNH`, or `B1NH` for the last token alone.
            key: `BTKH`.
            value: `BTKD`.
            count: See `Cache.append`.
            **options: Those of `jattn.attention`, but no bias or mask by column: columns
                are slots here.

        Returns:
            The output, `BTND`, and the cache with the tokens.
        """
        where = "caches.extend"
        key, value, count = self._checked("extend", key, value, count)
        query = asked.check_query(where, query, self.batch, self.store)
        options = asked.by_position(where, options)
        after = self._appended(key, value, count)
        asked.check_rows(where, query, key.shape[len(self.batch)], one=True)
        if query.shape[-3] == 1:
            return after._last(query, count, options), after
        return self._prompt(query, key, value, count, options), after

    def take(self, indices) -> "RollingCache":
        """Gives the examples `indices`, in this order."""
        store = taken("caches.take", self.store, indices)
        length = self.length
        if length.ndim:  # an example that is not there is full of NaN
            full = {"mode": "fill", "fill_value": self.capacity}
            length = jnp.take(length, jnp.asarray(indices), 0, **full)
        return dataclasses.replace(self, store=store, length=length)

    def dequantize(self, dtype="float32") -> "RollingCache":
        """Gives the same tokens without rounding."""
        return dataclasses.replace(self, store=self.store.exact(dtype, apart=True))

    def _checked(self, name, key, value, count):
        where, store = f"caches.{name}", self.store
        shapes = (store.num_heads, store.head_dim), (store.num_heads, store.value_dim)
        tokens = {"key": (key, shapes[0]), "value": (value, shapes[1])}
        key, value = asked.check_tokens(where, store, **tokens)
        return key, value, self._count(where, count, key.shape[len(self.batch)])

    def _count(self, where, count, T: int):
        count = asked.check_count(where, count, self.length.shape, T)
        return jnp.broadcast_to(jnp.asarray(count, jnp.int32), self.length.shape)

    def _appended(self, key, value, count) -> "RollingCache":
        T = key.shape[len(self.batch)]
        start, end = (of_each(x, self.batch) for x in (self.length, self.length + count))
        step = jnp.arange(T, dtype=jnp.int32).reshape(*[1] * start.ndim, T)
        p, end = start[..., None] + step, end[..., None]
        slot = jnp.where(p < self.sinks, p, self.sinks + (p - self.sinks) % self.window)
        # Of tokens that would share a slot, only the last is written.
        kept = (p < end) & ((p < self.sinks) | (p >= end - self.window))
        slot = jnp.where(kept, slot, self.capacity + step)
        store = put.put_at(self.store, key, value, slot)
        return dataclasses.replace(self, store=store, length=self.length + count)

    def _seen(self, options) -> Mask:
        """Says what a query may see, of tokens that are there: those before 0 are not."""
        window, sinks = self.window, self.sinks

        def near(b, n, t, s):
            return (s >= 0) & (t >= s) & ((t - s < window) | (s < sinks))

        mask = options.get("mask")
        return Pointwise(near) if mask is None else Pointwise(near) & mask

    def _last(self, query, count, options) -> jax.Array:
        """Attends from a query at the last token of each example."""
        last = self.length - 1
        position = last if last.ndim == 0 else of_each(last, self.batch)[..., None]
        given = options | {"query_position": position}
        output = self._held(query, given, "output").output
        seen = of_each(count, self.batch)[..., None, None, None] > 0
        return jnp.where(seen, output, 0)

    def _held(self, query, options, form: Form) -> Any:
        """Attends to what is in the slots; gives the result in a form."""
        position = self.key_position
        if position.ndim == 1:  # of all examples: alone, there may be as many of these
            position = position[None]
        else:
            missing = [1] * (len(self.batch) - self.length.ndim)
            position = position.reshape(*position.shape[:-1], *missing, -1)
            position = jnp.broadcast_to(position, (*self.batch, self.capacity))
        given = options | {"mask": self._seen(options), "key_position": position}
        end = jnp.minimum(jnp.max(self.length, initial=0), self.capacity)
        return attend.attend("caches.extend", query, self.store, end, given, form)

    def _prompt(self, query, key, value, count, options) -> jax.Array:
        """Attends from new tokens to the slots as they were, and to each other."""
        sizes, wide = attend.sizes_of(query, self.store), wide_dtype(query.dtype)
        sink = check_sink("caches.extend", options.get("sink"), sizes)
        start, row = self.length, jnp.arange(sizes.T, dtype=jnp.int32)
        row = row.reshape(*[1] * len(self.batch), sizes.T)
        start = of_each(start, self.batch)[..., None] + row if start.ndim else start
        options = options | {"sink": None, "query_position": start}
        dtype, query = query.dtype, query.astype(wide)  # which both parts of the call read
        old = self._held(query, options, "sums")
        if self.store.is_rounded:  # all queries see what is stored
            key, value = put.stored_vectors(self.store, key, value, wide)
        # Both calls draw from one key, which `jax.debug_key_reuse` should not report.
        again = {"dropout": jax.tree.map(jax.random.clone, options.get("dropout"))}
        options |= again | {"mask": self._seen(options), "key_position": start}
        new = attended("caches.extend", "sums", query, key, value, **options)
        output = with_sink(combined(old, new), sink).astype(dtype)
        seen = row < of_each(count, self.batch)[..., None]
        return jnp.where(seen[..., None, None], output, 0)


def rolling(
    batch_size: int | tuple[int, ...],
    window: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    sinks: int = 0,
    dtype: Any = "float32",
    ragged: bool = False,
) -> RollingCache:
    """Makes a cache of the last `window` tokens, and of the first `sinks`.

    Args:
        batch_size: B, or several axes, or `()` for none.
        window: How many keys a query sees, its own included; at least 1.
        num_kv_heads: K.
        head_dim: H.
        value_head_dim: D; H by default.
        sinks: How many of the first tokens are kept, and seen by every query. They keep
            their own positions.
        dtype: See `empty`.
        ragged: Whether each example has a length of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> kv = rolling(1, 2, 1, 2)
        >>> key = jnp.zeros((1, 4, 1, 2))
        >>> value = jnp.arange(4.0).reshape(1, 4, 1, 1) * jnp.ones(2)
        >>> output, kv = kv.extend(key, key, value)  # each sees itself and the one before
        >>> output[0, :, 0, 0]
        Array([0. , 0.5, 1.5, 2.5], dtype=float32)
    """
    where, batch = "caches.rolling", batch_axes("caches.rolling", batch_size)
    least = {"window": (window, 1), "sinks": (sinks, 0)}  # 1: the query's own token
    window, sinks = check_sizes(where, **least)
    vectors = check_vectors(where, num_kv_heads, head_dim, value_head_dim, dtype)
    store = blank(batch, window + sinks, *vectors, apart=True)
    return RollingCache(store, no_tokens(where, batch, ragged), window, sinks)
