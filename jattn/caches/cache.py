"""A cache: keys and values of the tokens so far, with room for more.

A cache stands for the sequence that was appended: `attend` equals `jattn.attention` over
the plain list of tokens. It is a value, and every method gives a new one. Inside `jit` with
the cache donated, or in the carry of `scan`, nothing is copied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import is_known
from jattn.arrays.meshes import methods_across
from jattn.caches import asked, attend, put, write
from jattn.caches.sizes import batch_axes, check_sizes, check_vectors, no_tokens
from jattn.caches.store import Store, blank, taken
from jattn.implementations.sums import Form
from jattn.pytree import pytree
from jattn.state import State


@pytree("store", "length")
@methods_across
class Cache:
    """Tokens in order, and how many there are; `empty` makes one.

    A frozen dataclass and a pytree. Where the head of an example is full, under `jit`, what
    fits is written and `length` counts on; such an example attends to NaN until it is
    truncated. Where the numbers are known, that is a ValueError.

    Attributes:
        store: The vectors, in an order of their own.
        length: How many tokens were appended: one number, or one of each example.
    """

    store: Store
    length: jax.Array

    @property
    def batch(self) -> tuple[int, ...]:
        """Gives the axes of examples."""
        return self.store.batch

    @property
    def capacity(self) -> int:
        """Says how many tokens there is room for in all."""
        return self.store.slots

    @property
    def room(self) -> jax.Array:
        """Says how many more tokens fit, of the shape of `length`."""
        return jnp.maximum(self.capacity - self.length, 0)

    @property
    def key(self) -> jax.Array:
        """Gives the keys, `BSKH`; what was not appended is 0 or old."""
        return self.store.vectors(self._dtype)[0]

    @property
    def value(self) -> jax.Array:
        """Gives the values, `BSKD`; what was not appended is 0 or old."""
        return self.store.vectors(self._dtype)[1]

    @property
    def _dtype(self):
        return jnp.float32 if self.store.is_rounded else self.store.dtype

    def append(self, key, value, *, count=None) -> "Cache":
        """Adds T tokens after those so far.

        Args:
            key: `BTKH`.
            value: `BTKD`.
            count: Only the first `count` of the T are added: one number, or one of each
                example where the cache is ragged. All by default.

        Returns:
            The cache with the tokens.

        Raises:
            ValueError: If they do not fit, as far as that is known.
        """
        where, K = "caches.append", self.store.num_heads
        shapes = (K, self.store.head_dim), (K, self.store.value_dim)
        tokens = {"key": (key, shapes[0]), "value": (value, shapes[1])}
        key, value = asked.check_tokens(where, self.store, **tokens)
        return self.appended(where, key, value, count)

    def appended(self, where: str, key, value, count) -> "Cache":
        """Gives the cache with tokens that were checked, added for `where`."""
        T = key.shape[len(self.batch)]
        count = asked.check_count(where, count, self.length.shape, T)
        _check_room(where, self.length, count, T, self.capacity)
        if self.length.ndim == 0 and jnp.ndim(count) == 0:
            store = put.put_run(self.store, key, value, self.length, count)
        else:
            start, many = (asked.of_each(x, self.batch) for x in (self.length, count))
            slots = write.run_slots(start, many, T, self.capacity)
            store = put.put_at(self.store, key, value, slots)
        return dataclasses.replace(self, store=store, length=self.length + count)

    def attend(self, query, *, count=None, **options) -> jax.Array:
        """Attends to all tokens, from queries that stand at the last T of them.

        Args:
            query: `BTNH`, in the dtype of the cache.
            count: As in the `append` before, where that had one: the first `count` queries
                stand at the last `count` tokens, and the others see nothing.
            **options: Those of `jattn.attention`. Without a `mask` a query sees all that is
                there: say `Causal()` where several were appended. Positions count from the
                first token; a bias or a Boolean mask has `capacity` columns.

        Returns:
            The output, `BTND`, equal to `jattn.attention` over the tokens.
        """
        return self._attended("caches.attend", query, count, options, "output").output

    def attend_state(self, query, *, count=None, **options) -> State:
        """Attends like `attend`, and also gives the logsumexp, for `jattn.merge`.

        Args:
            query: See `attend`, and so are all others.
            count: See `attend`.
            **options: See `attend`.

        Returns:
            A `State`, as of `jattn.attention_state`.
        """
        return self._attended("caches.attend_state", query, count, options, "state")

    def extend(self, query, key, value, *, count=None, **options):
        """Appends tokens and attends from them: what every kind of cache has.

        Args:
            query: `BTNH`.
            key: `BTKH`.
            value: `BTKD`.
            count: See `append`.
            **options: See `attend`.

        Returns:
            The output, `BTND`, and the cache with the tokens.
        """
        cache = self.append(key, value, count=count)
        asked.check_rows("caches.extend", query, jnp.shape(key)[len(self.batch)])
        return cache.attend(query, count=count, **options), cache

    def truncate(self, length) -> "Cache":
        """Forgets all tokens after the first `length`, one number or one of each.

        Where there are fewer tokens, all of them stay. A length below 0 is a ValueError
        where it is known, and else 0.
        """
        asking = "caches.truncate", "length", length, self.length.shape
        length = asked.check_whole(*asking, least=0)
        return dataclasses.replace(self, length=jnp.clip(length, 0, self.length))

    def take(self, indices) -> "Cache":
        """Gives the examples `indices`, in this order: for beams, and to copy a prompt."""
        store = taken("caches.take", self.store, indices)
        length = self.length
        if length.ndim:  # an example that is not there attends to NaN
            over = self.capacity + 1  # not the largest int32, which `append` adds to
            length = jnp.take(length, jnp.asarray(indices), 0, mode="fill", fill_value=over)
        return dataclasses.replace(self, store=store, length=length)

    def dequantize(self, dtype="float32") -> "Cache":
        """Gives the same tokens without rounding: what a rounded cache means."""
        return dataclasses.replace(self, store=self.store.exact(dtype, apart=True))

    def _attended(self, where, query, count, options, form: Form) -> State:
        query = asked.check_query(where, query, self.batch, self.store)
        asking = where, self.store, self.length
        state = attend.from_last(*asking, query, count, options, form)
        return attend.spoiled(state, self.length > self.capacity)


def empty(
    batch_size: int | tuple[int, ...],
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    dtype: Any = "float32",
    ragged: bool = False,
) -> Cache:
    """Makes a cache without tokens.

    Args:
        batch_size: B, or several axes, or `()` for none.
        capacity: How many tokens there is room for, of each example.
        num_kv_heads: K.
        head_dim: H.
        value_head_dim: D; H by default.
        dtype: That of queries, keys and values; or "int8", "float8_e4m3fn" or "int4", to
            which what is appended is rounded, with a scale for each token and head.
        ragged: Whether each example has a length of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> kv = empty(1, 8, 1, 2)
        >>> token = jnp.ones((1, 1, 1, 2))
        >>> output, kv = kv.extend(token, token, 3 * token)
        >>> output, int(kv.length)
        (Array([[[[3., 3.]]]], dtype=float32), 1)
    """
    where, batch = "caches.empty", batch_axes("caches.empty", batch_size)
    (slots,) = check_sizes(where, capacity=(capacity, 0))
    vectors = check_vectors(where, num_kv_heads, head_dim, value_head_dim, dtype)
    store = blank(batch, slots, *vectors, apart=True)
    return Cache(store, no_tokens(where, batch, ragged))


def _check_room(where: str, length, count, T: int, capacity: int) -> None:
    if capacity < T:
        raise ValueError(
            f"{where}: {T} tokens must fit a capacity of {capacity}; make the cache "
            f"larger, or use `caches.rolling`."
        )
    if not (is_known(length) and is_known(count)):
        return
    count = np.asarray(count)  # not by JAX, whose numbers are not known inside `jit`
    # An example that gets no token may be too long already: it attends to NaN.
    most = np.max(np.where(count > 0, np.asarray(length) + count, 0), initial=0)
    if most > capacity:
        raise ValueError(
            f"{where}: {most} tokens must fit a capacity of {capacity}; make the cache "
            f"larger, or truncate it first."
        )
