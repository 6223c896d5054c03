"""One cache for all layers, which each of them reads and changes in its turn.

A cache of each layer in a stack would be cut out and put back at each step, which takes the
time of its capacity. So all layers share one paged cache, in which **each layer of each
example is an example of its own**: number `layer · B + b`. A layer looks at its own rows of
the table, and writes into the pages in place. A step takes the time of what is filled.

With a window the capacity is small. There each layer has a rolling cache, in a stack.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from examples.chat.model import Attend, Sizes
from jattn import caches
from jattn.caches import PagedCache, RollingCache
from jattn.masks import Causal

PAGE = 64  # tokens; small pages waste less, large ones are read in longer runs


def empty(
    sizes: Sizes,
    batch: int,
    capacity: int,
    dtype: Any = "float32",
    *,
    page: int = PAGE,
    pages: int | None = None,
) -> PagedCache:
    """Makes a cache of all layers for B examples, each of up to so many tokens.

    Args:
        sizes: Those of the model.
        batch: B.
        capacity: How many tokens an example can have.
        dtype: That of the vectors; "int8" to round them.
        page: Tokens in a page.
        pages: How many pages each layer has for all examples together; as many as B full
            examples need by default.
    """
    most = -(-capacity // page)
    pages = batch * most if pages is None else pages
    heads = sizes.kv_heads, sizes.head_size
    rows = {"batch_size": sizes.layers * batch, "max_pages": most}
    return caches.paged(sizes.layers * pages, page, *heads, **rows, dtype=dtype)


def rolling(
    sizes: Sizes, batch: int, window: int, sinks: int, dtype: Any = "float32"
) -> RollingCache:
    """Makes a stack of caches of the last tokens and the first few, one of each layer."""
    heads = sizes.kv_heads, sizes.head_size
    one = caches.rolling(batch, window, *heads, sinks=sinks, dtype=dtype, ragged=True)
    return jax.tree.map(lambda x: jnp.stack([x] * sizes.layers), one)


def lengths(kv, sizes: Sizes) -> jax.Array:
    """Says how many tokens each example has, `B`: as many in the first layer as in all."""
    return kv.length.reshape(sizes.layers, -1)[0]


def of_all(kv, sizes: Sizes, examples) -> jax.Array:
    """Gives the numbers that examples have in the paged cache, all layers of them."""
    B = kv.batch[0] // sizes.layers
    layer = jnp.arange(sizes.layers, dtype=jnp.int32)[:, None]
    return (layer * B + jnp.atleast_1d(jnp.asarray(examples, jnp.int32))[None]).reshape(-1)


def reserved(kv, sizes: Sizes, first, count):
    """Gives the cache with pages for `count` more tokens of examples from `first` on."""
    if isinstance(kv, RollingCache):
        return kv
    more = jnp.zeros((sizes.layers, kv.batch[0] // sizes.layers), jnp.int32)
    new = jnp.broadcast_to(count[None], (sizes.layers, count.size)).astype(jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    more = jax.lax.dynamic_update_slice(more, new, (zero, first))
    return kv.reserve(more.reshape(-1))


def extending(sizes: Sizes, first, count) -> Attend:
    """Attends to a layer's tokens after `count` more of the examples from `first` on."""
    return Partial(_extend, sizes, first, count)


def _extend(sizes: Sizes, first, count, kv, layer, query, key, value):
    if isinstance(kv, RollingCache):
        return _in_stack(count, kv, layer, query, key, value)
    one, row = of_layer(kv, sizes, layer, first, query.shape[0])
    output, one = one.extend(query, key, value, count=count, mask=Causal())
    length = jax.lax.dynamic_update_slice_in_dim(kv.length, one.length, row, 0)
    return output, dataclasses.replace(kv, store=one.store, length=length)


def _in_stack(count, kv, layer, query, key, value):
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), kv)
    output, one = one.extend(query, key, value, count=count)
    put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, layer, 0)
    return output, jax.tree.map(put, kv, one)


def of_layer(kv: PagedCache, sizes: Sizes, layer, first, batch: int):
    """Gives the cache as one layer of some examples sees it, and the first row it has.

    Its pages were reserved, so appending to it takes none.
    """
    row = layer * (kv.batch[0] // sizes.layers) + first
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, row, batch, 0)
    return dataclasses.replace(kv, table=cut(kv.table), length=cut(kv.length)), row
