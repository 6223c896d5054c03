"""Tokens of any examples in one call: what a server has to do in each step.

Some examples have prompts to read and others one token to decode. Their queries are one
sequence, the slots of all pages another, and a mask says which belong together:

    a query of example e sees a slot    if e owns its page, and the slot holds a token

A page has the same place in the table of each example that owns it, as forks copy whole
tables. So each slot has one position, and masks and modifiers of positions keep theirs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.api.attention import attention
from jattn.caches import asked
from jattn.caches.attend import dtype_of, spoiled
from jattn.caches.examples import check_owners
from jattn.masks import Mask
from jattn.modifiers import Modifier, as_modifier
from jattn.pytree import pytree


@pytree("example", "page", "owns", "length", "mask")
class OfTokens(Mask):
    """A mask that shows a query those tokens of its own example that a mask allows.

    Attributes:
        example: Whose each query is, `T`; −1 for nobody's.
        page: The page of each slot, `S`.
        owns: Which pages each example has, `B × P`.
        length: How many tokens each example has, `B`.
        mask: A mask of positions, or None.
    """

    example: jax.Array
    page: jax.Array
    owns: jax.Array
    length: jax.Array
    mask: Mask | None

    def aligned(self, sizes) -> Any:
        """Gives each row's example, each column's page, and what the mask reads."""
        inner = () if self.mask is None else self.mask.aligned(sizes)
        return self.example.reshape(1, 1, -1, 1), self.page.reshape(1, 1, 1, -1), inner

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Gives the page is the example's, the slot is filled, and the mask allows it."""
        example, page, inner = elements
        whose = jnp.maximum(example, 0)
        seen = (example >= 0) & self.owns[whose, page] & (s < self.length[whose])
        if self.mask is None:
            return seen
        return seen & self.mask.allows(whose, n, t, s, inner)


@pytree("example", "modifier")
class ModifierOfTokens(Modifier):
    """A modifier that sees as b the example of each query."""

    example: jax.Array
    modifier: Modifier

    def aligned(self, sizes) -> Any:
        """Gives the example of each row, and what the modifier reads."""
        return self.example.reshape(1, 1, -1, 1), self.modifier.aligned(sizes)

    def modify(self, logit, b, n, t, s, elements):
        """Modifies as in the query's example."""
        example, inner = elements
        return self.modifier.modify(logit, jnp.maximum(example, 0), n, t, s, inner)


def attend(where: str, cache, query, example, position, options) -> jax.Array:
    """Attends from tokens TNH of the examples T; `PagedCache.attend_tokens` says how."""
    query = asked.check_query(where, query, (), cache.store)
    shape = query.shape[:1]
    (B,) = cache.batch
    example = check_owners(where, example, shape, B)
    position = asked.check_whole(where, "position", position, shape)
    dtype = dtype_of(query, cache.store)
    key, value = cache.store.vectors(dtype)
    key, value = (x.reshape(-1, *x.shape[2:]) for x in (key, value))
    ways = _of_tokens(where, cache, example, options)
    placed = {"query_position": position, "key_position": _slot_positions(cache)}
    output = attention(query.astype(dtype), key, value, **options | ways | placed)
    over = (example >= 0) & jnp.take(cache.over, example, mode="clip") | (example >= B)
    return spoiled(output.astype(query.dtype), over)


def _of_tokens(where: str, cache, example, options):
    """Makes the mask and modifier of a call whose queries have examples of their own."""
    options = asked.by_position(where, options)
    mask, modifier = options["mask"], options.get("modifier")
    modifier = None if modifier is None else as_modifier(modifier, where)
    dropout = options.get("dropout")
    if dropout is not None and dropout.rate and not dropout.shared:
        raise ValueError(
            f"{where}: `dropout` must be shared by examples, for a page may belong to "
            f"several; give `Dropout(rate, rng, shared=True)`."
        )
    table, num_pages, page_size = cache.table, cache.num_pages, cache.page_size
    page = jnp.arange(num_pages, dtype=jnp.int32).repeat(page_size)
    row = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    own = jnp.where(table >= 0, table, num_pages)
    owns = jnp.zeros((table.shape[0], num_pages), bool).at[row, own].set(True, mode="drop")
    mask = OfTokens(example, page, owns, cache.length, mask)
    if modifier is None:
        return {"mask": mask}
    return {"mask": mask, "modifier": ModifierOfTokens(example, modifier)}


def _slot_positions(cache) -> jax.Array:
    """Gives the position of each slot of the pool in the examples that own it, `S`."""
    table, num_pages, page_size = cache.table, cache.num_pages, cache.page_size
    block = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    own = jnp.where(table >= 0, table, num_pages)
    first = jnp.zeros(num_pages, jnp.int32)
    first = first.at[own].set(jnp.broadcast_to(block * page_size, own.shape), mode="drop")
    step = jnp.arange(page_size, dtype=jnp.int32)
    return (first[:, None] + step[None]).reshape(-1)
