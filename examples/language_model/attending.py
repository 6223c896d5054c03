"""The ways in which the model attends: functions (layer, query, key, value) → output.

This is all that the model needs of `jattn`: one mask written as a lambda, and a cache for
each layer.
"""

import dataclasses

import jax
import jax.numpy as jnp

import jattn
from examples.language_model.model import Attend, LanguageModel
from examples.language_model.settings import Sizes
from jattn import caches
from jattn.caches import Cache
from jattn.masks import Causal, as_mask


def document_mask(document):
    """Lets each token see itself and what stands before it in its own document.

    Blocks of tokens that share no document are skipped, and nothing is ever T×T.

    Args:
        document: Which document of its row each token belongs to, `BT`.
    """
    return lambda b, n, t, s: (t >= s) & (document[b, t] == document[b, s])


def within_documents(document, **options) -> Attend:
    """Attends within documents: how the model learns. Options are for `attention`."""
    options["mask"] = document_mask(document)
    return lambda layer, query, key, value: jattn.attention(query, key, value, **options)


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


def empty_caches(sizes: Sizes, batch: int, room: int) -> list[Cache]:
    """Makes a cache for each layer, with room for so many tokens of each example."""
    shape = batch, room, sizes.kv_heads, sizes.head_size
    return [caches.empty(*shape) for _ in range(sizes.layers)]


def extend(
    model: LanguageModel, tokens, kept: list[Cache]
) -> tuple[jax.Array, list[Cache]]:
    """Reads more tokens, `BT`, after those in the caches.

    Returns:
        The logits of each next token, and the caches with these tokens in them.
    """
    after = list(kept)

    def attend(layer, *token):
        output, after[layer] = kept[layer].extend(*token, mask=Causal())
        return output

    position = kept[0].length + jnp.arange(tokens.shape[1])
    return model(tokens, jnp.broadcast_to(position, tokens.shape), attend), after


# To compare with: the same function of the same inputs, computed otherwise.


def without_document_skipping(document) -> Attend:
    """Attends with the same mask, but skips only the blocks that `Causal` leaves empty."""
    mask = as_mask(document_mask(document))

    def attend(layer, query, key, value):
        table = jattn.block_table(Causal(), query, key)
        kinds = jnp.minimum(table.kinds, 1)  # 0 empty, 1 partial: ask the mask pair by pair
        table = dataclasses.replace(table, mask=mask, kinds=kinds)
        return jattn.attention(query, key, value, mask=table)

    return attend


def by_jax_nn(document) -> Attend:
    """Attends by `jax.nn.dot_product_attention` with the mask as an array, `B1TT`."""
    B, T = document.shape
    b, t, s = jnp.ogrid[:B, :T, :T]
    mask = document_mask(document)(b, 0, t, s)[:, None]
    return lambda layer, query, key, value: jax.nn.dot_product_attention(
        query, key, value, mask=mask
    )
