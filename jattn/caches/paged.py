"""A paged cache: examples own pages of one pool, and give them back.

Sequences of unlike lengths share memory, and a forked prompt is stored once. A table says
which pages hold an example's tokens, in order; `pages` says which are free, inside the
compiled program. An example that finds no page free is marked as too long, and attends to
NaN until it is truncated or released.

Pages with several owners are never written: an example's last page, where its next token
goes, is its own. `fork`, `take` and `truncate` see to that by copying it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.arrays.meshes import methods_across
from jattn.caches import asked, attend, put, sharing, tokens
from jattn.caches.examples import check_examples, check_pairs, chosen_examples
from jattn.caches.pages import Pages
from jattn.caches.pool import Pool, full_pool
from jattn.caches.sizes import check_sizes, check_vectors
from jattn.caches.store import Store, blank
from jattn.implementations.sums import Form
from jattn.pytree import pytree
from jattn.state import State


@pytree("store", "table", "length", "pool")
@methods_across
class PagedCache:
    """Tokens in pages; `paged` makes one.

    Attributes:
        store: The vectors, with pages in the place of examples.
        table: The pages of each example in order, `B × max_pages`; −1 for none.
        length: How many tokens each example has, `B`; 2³⁰ more where `reserve` failed.
        pool: Which pages are free.
    """

    store: Store
    table: jax.Array
    length: jax.Array
    pool: Pool

    @property
    def batch(self) -> tuple[int, ...]:
        """Gives the axis of examples."""
        return self.table.shape[:1]

    @property
    def num_pages(self) -> int:
        """Says how many pages all examples share."""
        return self.store.batch[0]

    @property
    def page_size(self) -> int:
        """Says how many tokens a page holds."""
        return self.store.slots

    @property
    def capacity(self) -> int:
        """Says how many tokens an example can have."""
        return self.table.shape[1] * self.page_size

    @property
    def room(self) -> jax.Array:
        """Says how many more tokens fit into the pages that each example has."""
        return jnp.maximum(self.owned * self.page_size - self.length, 0)

    @property
    def num_free(self) -> jax.Array:
        """Says how many pages are free."""
        return self.pool.num_free

    @property
    def owned(self) -> jax.Array:
        """Says how many pages each example has, `B`."""
        return jnp.sum(self.table >= 0, axis=1, dtype=jnp.int32)

    @property
    def over(self) -> jax.Array:
        """Says which examples have more tokens than their pages hold, `B`."""
        return self.length > self.owned * self.page_size

    def reserve(self, count) -> "PagedCache":
        """Takes the pages that `count` more tokens need, one number or one of each example.

        `append` does so by itself; this is to know beforehand. An example for which not
        enough pages are free gets none, and is marked as too long.

        Raises:
            ValueError: If there are too few, as far as that is known.
        """
        count = asked.check_whole("caches.reserve", "count", count, self.batch, 0)
        count = jnp.minimum(count, self.capacity + 1)  # int32 holds no length far beyond
        grown, granted = sharing.grown(self, count)
        grown = dataclasses.replace(grown, length=sharing.marked(self.length, granted))
        return sharing.checked("caches.reserve", grown, self.over)

    def append(self, key, value, *, count=None) -> "PagedCache":
        """Adds T tokens, of each example only the first `count`; takes pages as needed.

        Args:
            key: `BTKH`.
            value: `BTKD`.
            count: One number, or one of each example; T by default.

        Raises:
            ValueError: If too few pages are free, as far as that is known.
        """
        where, K = "caches.append", self.store.num_heads
        given = {"key": (key, (K, self.store.head_dim))}
        given["value"] = value, (K, self.store.value_dim)
        key, value = asked.check_tokens(where, self.store, batch=self.batch, **given)
        count = asked.check_count(where, count, self.batch, key.shape[1])
        count = asked.of_each(count, self.batch)
        grown, _ = sharing.grown(self, count)
        step = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        position = sharing.unmarked(self.length)[:, None] + step
        page = sharing.page_of(grown, position)
        # What is dropped goes to pages that are not there, each to another.
        beyond = jnp.arange(page.size, dtype=jnp.int32).reshape(page.shape) + self.num_pages
        page = jnp.where((step < count[:, None]) & (page >= 0), page, beyond)
        store = put.put_pairs(self.store, key, value, page, position % self.page_size)
        grown = dataclasses.replace(grown, store=store, length=self.length + count)
        return sharing.checked(where, grown, self.over)

    def attend(self, query, *, count=None, **options) -> jax.Array:
        """Attends to all tokens of each example; see `Cache.attend`."""
        return self._attended("caches.attend", query, count, options, "output").output

    def attend_state(self, query, *, count=None, **options) -> State:
        """Attends like `attend`, and also gives the logsumexp."""
        return self._attended("caches.attend_state", query, count, options, "state")

    def attend_tokens(self, query, example, position, **options) -> jax.Array:
        """Attends from tokens of any examples in one call: some prefill, others decode.

        Args:
            query: `TNH`.
            example: Whose each token is, `T`; −1 for padding, which sees nothing.
            position: Where each stands in its example, `T`.
            **options: Those of `jattn.attention`, but no bias or mask by column. A mask or
                modifier sees as b the example. Say `Causal()`. Dropout must be `shared`.

        Returns:
            The output, `TND`.
        """
        where = "caches.attend_tokens"
        return tokens.attend(where, self, query, example, position, options)

    def extend(self, query, key, value, *, count=None, **options):
        """Appends tokens and attends from them; see `Cache.extend`."""
        cache = self.append(key, value, count=count)
        asked.check_rows("caches.extend", query, jnp.shape(key)[1])
        return cache.attend(query, count=count, **options), cache

    def release(self, examples) -> "PagedCache":
        """Empties examples, given by number or as Booleans `B`, and frees their pages."""
        chosen = chosen_examples("caches.release", examples, self.batch)
        gone = jnp.where(chosen[:, None], self.table, -1)
        return dataclasses.replace(
            self,
            pool=self.pool.released(gone),
            table=jnp.where(chosen[:, None], -1, self.table),
            length=jnp.where(chosen, 0, self.length),
        )

    def fork(self, source, target) -> "PagedCache":
        """Makes examples `target` copies of examples `source`, which share their pages.

        Pages that were reserved and hold no token yet stay with the source.

        Args:
            source: The number of an example, or several.
            target: As many others, which are emptied before.
        """
        (B,) = self.batch
        return sharing.copied(self, *check_pairs("caches.fork", source, target, B))

    def take(self, indices) -> "PagedCache":
        """Gives the examples `indices`, B of them, in this order; copies share pages."""
        whose = check_examples("caches.take", "indices", indices, self.batch, *self.batch)
        again = jnp.any(jnp.tril(whose[:, None] == whose[None], -1), axis=1)
        return sharing.copied(self, whose, again)

    def truncate(self, length) -> "PagedCache":
        """Forgets tokens as `Cache.truncate` does, and frees the pages beyond them."""
        length = asked.check_whole("caches.truncate", "length", length, self.batch, 0)
        length = jnp.clip(length, 0, sharing.unmarked(self.length))
        beyond = sharing.unused(self, length)
        pool = self.pool.released(jnp.where(beyond, self.table, -1))
        table = jnp.where(beyond, -1, self.table)
        cache = dataclasses.replace(self, pool=pool, table=table, length=length)
        return sharing.with_own_last(cache, jnp.ones(self.batch, bool))

    def dequantize(self, dtype="float32") -> "PagedCache":
        """Gives the same tokens without rounding."""
        return dataclasses.replace(self, store=self.store.exact(dtype))

    def _attended(self, where, query, count, options, form: Form) -> State:
        query = asked.check_query(where, query, self.batch, self.store)
        pages, length = Pages(self.store, self.table), sharing.unmarked(self.length)
        state = attend.from_last(where, pages, length, query, count, options, form)
        return attend.spoiled(state, self.over)


def paged(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    batch_size: int,
    max_pages: int,
    dtype: Any = "float32",
) -> PagedCache:
    """Makes a cache of pages, all of them free.

    Args:
        num_pages: P, how many pages all examples share.
        page_size: How many tokens a page holds.
        num_kv_heads: K.
        head_dim: H.
        value_head_dim: D; H by default.
        batch_size: B, how many examples there can be at once.
        max_pages: How many pages one example can have.
        dtype: See `empty`.

    Example:
        >>> import jax.numpy as jnp
        >>> kv = paged(4, 2, 1, 8, batch_size=2, max_pages=4)
        >>> kv = kv.append(*2 * [jnp.ones((2, 3, 1, 8))], count=jnp.array([3, 0]))
        >>> kv = kv.fork(0, 1)
        >>> kv.table  # the full page is shared, the other was copied
        Array([[ 0,  1, -1, -1],
               [ 0,  2, -1, -1]], dtype=int32)
        >>> int(kv.release([0, 1]).num_free)
        4
    """
    where, some = "caches.paged", {"num_pages": (num_pages, 1), "page_size": (page_size, 1)}
    some |= {"max_pages": (max_pages, 1), "batch_size": (batch_size, 0)}
    P, size, most, B = check_sizes(where, **some)
    vectors = check_vectors(where, num_kv_heads, head_dim, value_head_dim, dtype)
    table = jnp.full((B, most), -1, jnp.int32)
    length = jnp.zeros(B, jnp.int32)
    return PagedCache(blank((P,), size, *vectors), table, length, full_pool(P))
