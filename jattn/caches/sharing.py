"""Pages that are taken, shared and copied: what happens to the table of a paged cache.

An example's last page, where its next token goes, is its own unless it is full.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import is_known

# Added to the length of an example that could not reserve pages: more tokens than one has.
# Its own tokens still count, so `truncate` shows no slot that was never filled.
MARK = 2**30


def marked(length, granted) -> jax.Array:
    """Gives lengths that are too long for any pages where these were not granted."""
    return jnp.where(granted | (length >= MARK), length, length + MARK)


def unmarked(length) -> jax.Array:
    """Says how many tokens examples have, whether these lengths are marked or not."""
    return jnp.where(length < MARK, length, length - MARK)


def page_of(cache, position) -> jax.Array:
    """Gives the page that holds a position of each example, BT; −1 for none."""
    block = position // cache.page_size
    inside = block < cache.table.shape[1]
    block = jnp.minimum(block, cache.table.shape[1] - 1)
    return jnp.where(inside, jnp.take_along_axis(cache.table, block, axis=1), -1)


@jax.jit  # one program where it is called outside of one
def grown(cache, count):
    """Gives the cache with pages for more tokens, and which examples have all they need."""
    owned, most = cache.owned, cache.table.shape[1]
    needed = -(-(cache.length + count) // cache.page_size)
    fits = needed <= most
    wanted = jnp.where(fits & ~cache.over, jnp.maximum(needed - owned, 0), 0)
    pool, start, granted = cache.pool.claim(wanted)
    granted &= fits & ~cache.over
    block = jnp.arange(most, dtype=jnp.int32)[None]
    new = (block >= owned[:, None]) & (block < needed[:, None]) & granted[:, None]
    place = start[:, None] + block - owned[:, None]
    pages = jnp.where(new, cache.pool.page_of(place), -1)
    table = jnp.where(new, pages, cache.table)
    return dataclasses.replace(cache, table=table, pool=pool.owned(pages)), granted


def unused(cache, length) -> jax.Array:
    """Says which pages hold no token, if examples have these lengths: B × max_pages."""
    block = jnp.arange(cache.table.shape[1], dtype=jnp.int32)[None]
    return block * cache.page_size >= length[:, None]


def copied(cache, whose, again):
    """Copies the examples `whose`; those that come `again` get a new last page."""
    # A number that is no example's gives one that is too long, so that it attends to NaN.
    take = lambda x, fill: jnp.take(x, whose, axis=0, mode="fill", fill_value=fill)
    table, length = take(cache.table, -1), take(cache.length, cache.capacity + 1)
    # Pages that were reserved and hold nothing yet stay with the first: both would write.
    empty = unused(cache, unmarked(length))
    table = jnp.where(again[:, None] & empty, -1, table)
    pool = cache.pool.owned(table).released(cache.table)
    cache = dataclasses.replace(cache, table=table, pool=pool, length=length)
    return with_own_last(cache, again)


@jax.jit  # one program where it is called outside of one
def with_own_last(cache, chosen):
    """Gives the cache in which chosen examples share no page that is not full."""
    length = unmarked(cache.length)
    last = page_of(cache, length[:, None])[:, 0]
    shared = jnp.take(cache.pool.owners, last, mode="clip") > 1
    shared &= chosen & (last >= 0) & (length % cache.page_size > 0)
    claimed, start, granted = cache.pool.claim(shared.astype(jnp.int32))
    page = jnp.where(shared & granted, cache.pool.page_of(start), -1)
    pool = claimed.released(jnp.where(shared, last, -1)).owned(page)
    block = length // cache.page_size
    here = jnp.arange(cache.table.shape[1], dtype=jnp.int32)[None] == block[:, None]
    table = jnp.where(here & shared[:, None], page[:, None], cache.table)
    at = jnp.where(page >= 0, page, cache.num_pages)
    copy = lambda x, _: x.at[at].set(jnp.take(x, last, axis=0, mode="clip"), mode="drop")
    # Without a page of its own the example loses what was in the shared one.
    return dataclasses.replace(cache, store=cache.store.map(copy), table=table, pool=pool)


def checked(where: str, cache, before):
    """Gives the cache, or raises where it is known that pages were missing.

    Examples that were too long `before` are not reported again.
    """
    if not (is_known(cache.length) and is_known(cache.table)):
        return cache
    # In NumPy, whose counts have 64 bits, which JAX refuses to compare with 32.
    has = np.sum(np.asarray(cache.table) >= 0, axis=1) * cache.page_size
    missing = (np.asarray(cache.length) > has) & ~np.asarray(before)
    if np.any(missing):
        names, most = np.flatnonzero(missing).tolist(), cache.table.shape[1]
        raise ValueError(
            f"{where}: examples {names} need more pages than are free, or than the "
            f"{most} that an example can have; release others, or make the cache with "
            f"more pages."
        )
    return cache
