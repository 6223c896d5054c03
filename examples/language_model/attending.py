"""The ways in which the model attends: functions (layer, query, key, value) → output.

This is all that the model needs of `jattn`: one mask written as a lambda, and a cache that
is told from which position the queries look.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jattn
from examples.language_model.model import Attend, LanguageModel
from examples.language_model.settings import Sizes
from jattn.mask import as_mask
from jattn.masks import Causal


def document_mask(document):
    """Each token sees itself and what stands before it in its own document.

    Blocks of tokens that share no document are skipped, and nothing is ever T×T.

    Args:
        document: Which document of its row each token belongs to, `BT`.
    """
    return lambda b, n, t, s: (t >= s) & (document[b, t] == document[b, s])


def within_documents(document) -> Attend:
    """Attends within documents: how the model learns."""
    mask = document_mask(document)
    return lambda layer, query, key, value: jattn.attention(query, key, value, mask=mask)


def watching(document, row: int, seen: list) -> Attend:
    """Attends within documents, and adds the weights of one query to `seen`.

    They are `BNS` for each layer. R queries take R × S memory, so this works at any length.
    """
    mask = document_mask(document)

    def attend(layer, query, key, value):
        weights = jattn.attention_weights(query, key, mask=mask, rows=[row])
        seen.append(weights[:, :, 0])
        return jattn.attention(query, key, value, mask=mask)

    return attend


class Cache(NamedTuple):
    """The keys and values of all tokens so far, with room for more."""

    keys: list[jax.Array]  # BSKH for each layer
    values: list[jax.Array]
    length: jax.Array  # how many there are; what lies beyond is never looked at


def empty_cache(sizes: Sizes, batch: int, room: int) -> Cache:
    """A cache with room for so many tokens of each example."""
    shape = (batch, room, sizes.kv_heads, sizes.head_size)
    arrays = lambda: [jnp.zeros(shape) for _ in range(sizes.layers)]
    return Cache(arrays(), arrays(), jnp.int32(0))


def extend(model: LanguageModel, tokens, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads more tokens, `BT`, after those in the cache.

    The queries stand at `cache.length` and after it. The room that is still empty stands
    later, so `Causal` hides it.

    Returns:
        The logits of each next token, and the cache with these tokens in it.
    """
    keys, values, length = list(cache.keys), list(cache.values), cache.length

    def attend(layer, query, key, value):
        write = lambda array, new: lax.dynamic_update_slice_in_dim(array, new, length, 1)
        keys[layer] = write(keys[layer], key)
        values[layer] = write(values[layer], value)
        return jattn.attention(
            query, keys[layer], values[layer], mask=Causal(), query_position=length
        )

    batch, count = tokens.shape
    position = jnp.broadcast_to(length + jnp.arange(count), (batch, count))
    logits = model(tokens, position, attend)
    return logits, Cache(keys, values, length + count)


# To compare with: the same function of the same inputs, computed otherwise.


def without_document_skipping(document) -> Attend:
    """The same mask, of whose blocks those are skipped that `Causal` leaves empty."""
    mask = as_mask(document_mask(document))

    def attend(layer, query, key, value):
        table = jattn.block_table(Causal(), query, key)
        kinds = jnp.minimum(table.kinds, 1)  # 0 empty, 1 partial: ask the mask pair by pair
        table = dataclasses.replace(table, mask=mask, kinds=kinds)
        return jattn.attention(query, key, value, mask=table)

    return attend


def by_jax_nn(document) -> Attend:
    """`jax.nn.dot_product_attention` with the mask as an array, `B1TT`."""
    B, T = document.shape
    b, t, s = jnp.ogrid[:B, :T, :T]
    mask = document_mask(document)(b, 0, t, s)[:, None]
    return lambda layer, query, key, value: jax.nn.dot_product_attention(
        query, key, value, mask=mask
    )
