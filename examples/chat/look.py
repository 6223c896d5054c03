"""A look: the queries and keys of every layer and head over a text, as a page.

The text is read once more as a whole. Each layer leaves its queries and keys behind, and
`jattn.page` makes of them one file for a browser.
"""

import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

import jattn
from examples.chat import model
from examples.chat.tokens import Tokenizer
from examples.command import Refusal
from jattn import page
from jattn.masks import Causal


def check(path: str) -> None:
    """Raises a Refusal if a page cannot be written there, before anything is answered."""
    folder = pathlib.Path(path).absolute().parent
    if os.path.lexists(path):
        raise Refusal(f"{path}: is there already; give --look another name.")
    if not os.access(folder, os.W_OK):
        raise Refusal(f"{path}: cannot be written; --look needs a folder that is there.")


def queries_keys(params, sizes: model.Sizes, tokens: Sequence[int]):
    """Gives the queries `LTNH` and keys `LTKH` of all layers over a text, turned."""
    T, H = len(tokens), sizes.head_size
    dtype = params["embedding"].dtype
    numbers = sizes.heads, sizes.kv_heads
    kept = tuple(jnp.zeros((sizes.layers, T, number, H), dtype) for number in numbers)
    place = jnp.arange(T, dtype=jnp.int32)[None]
    text = jnp.asarray(tokens, jnp.int32)[None]
    return model.hidden(params, sizes, text, place, kept, Partial(_keep))[1]


def _keep(kept, layer, query, key, value):
    """Attends to the whole text, and keeps the queries and keys of the layer."""
    output = jattn.attention(query, key, value, mask=Causal())
    put = jax.lax.dynamic_update_index_in_dim
    new = zip(kept, (query, key), strict=True)
    return output, tuple(put(array, one[0], layer, 0) for array, one in new)


def named(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Gives the text of each token; a sign is written as it is called."""
    signs = set(tokenizer.signs)
    name = lambda token: tokenizer.spelling[token]
    return [name(x) if name(x) in signs else tokenizer.decode([x]) for x in tokens]


def page_of(params, sizes: model.Sizes, tokenizer: Tokenizer, tokens: Sequence[int], title):
    """Makes the page of a text."""
    queries, keys = queries_keys(params, sizes, tokens)
    words = named(tokenizer, tokens)
    return page.weights(list(queries), list(keys), words, mask=Causal(), title=title)
