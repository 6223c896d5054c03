"""The pages of masks and of weights, for any browser, without a network."""

from collections.abc import Sequence
from typing import Any

from jattn.arrays.checks import known_number
from jattn.arrays.integers import known_whole
from jattn.blocks.kinds import shares
from jattn.page import assembly
from jattn.page.blocks import blocks_of
from jattn.page.document import Page, document
from jattn.page.inputs import layers_of, named_tokens, options_of, per_layer
from jattn.page.packing import packed
from jattn.pictures.given import lengths

_MASK_SCRIPTS = ("unpack.js", "theme.js", "pairs.js", "names.js", "mask.js")


def weights(
    query,
    key,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    title: str | None = None,
    megabytes: float = 10.0,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
) -> Page:
    """Shows which tokens attend to which tokens, in every layer and head.

    Point at a token, or tap it, to see what it attends to and what attends to it. A head
    is chosen from small pictures of all of them; several chosen heads show their mean.
    A chosen pair of tokens is shown in all heads at once. It works with a mouse, with
    fingers, with the keyboard and with a screen reader.

    The T × S weights are never held at once. A page of up to four million weights has all
    of them. A page of more weights has at least the largest of each query and head, and
    all weights above one threshold; it says which share of the total weight that is. What
    each key receives, how far each query spreads, and the small pictures are sums of all
    weights.

    Args:
        query: `TNH` of one example; for several layers, a list with one such array for
            each layer. N may differ from layer to layer.
        key: `SKH`, likewise.
        tokens: What the queries are called, T of them; numbered by default.
        key_tokens: What the keys are called, S of them; by default as the queries if T = S.
        title: What to write above.
        megabytes: The largest size that the page may have, in 10⁶ bytes.
        mask: See `jattn.attention`, also for the other options; a list has one option for
            each layer.
        bias: See `jattn.attention`.
        modifier: See `jattn.attention`.
        sink: See `jattn.attention`.
        scale: See `jattn.attention`.
        query_position: See `jattn.attention`.
        key_position: See `jattn.attention`.

    Returns:
        The page.

    Raises:
        ValueError: If an argument does not fit, or the page cannot be as small as that.

    Example:
        >>> import jax
        >>> words = "the cat sat on the mat".split()
        >>> query, key = jax.random.normal(jax.random.key(0), (2, 6, 4, 16))
        >>> weights(query, key, words, mask=lambda b, n, t, s: t >= s)
        Page('Attention of 4 heads, 6 tokens', 0.1 MB)
    """
    where = "page.weights"
    options = {
        "mask": mask,
        "bias": bias,
        "modifier": modifier,
        "sink": sink,
        "scale": scale,
        "query_position": query_position,
        "key_position": key_position,
    }
    layers = layers_of(where, query, key)
    each = options_of(where, options, len(layers))
    T, S = layers[0][0].shape[-3], layers[0][1].shape[-3]
    names = _names(where, tokens, key_tokens, T, S)
    facts = {**names, "title": title, "T": T, "S": S}
    limit = 1e6 * _size(where, megabytes)
    return assembly.attending(where, facts, layers, each, limit)


def received(
    received, tokens: Sequence[str] | None = None, *, title: str | None = None
) -> Page:
    """Shows the attention that each token receives, as the colour behind it.

    Args:
        received: As from `jattn.attention_received` for one example, `SN`, or averaged over
            heads, `S`; for several layers, a list of such arrays.
        tokens: What the keys are called, S of them; numbered by default.
        title: What to write above.

    Returns:
        The page.

    Raises:
        ValueError: If `received` has another shape, or the tokens do not fit it.

    Example:
        >>> received([2.0, 0.5, 1.0], ["to", "be", "or"])
        Page('Received by 3 tokens, 1 head', 0.1 MB)
    """
    where = "page.received"
    layers = per_layer(where, "received", received, "S")
    S = len(layers[0])
    names = {"tokens": named_tokens(where, "tokens", tokens, "S", S), "key_tokens": None}
    return assembly.summed("received", {**names, "title": title, "T": S, "S": S}, layers)


def entropy(
    entropies, tokens: Sequence[str] | None = None, *, title: str | None = None
) -> Page:
    """Shows over how many keys each head of each layer spreads, as a map of all heads.

    A cell is the mean over queries. If there are numbers for each query, a click on a cell
    shows how far each token spreads in this head, as the colour behind the token.

    Args:
        entropies: One array for each layer, as from `jattn.attention_entropy`: `TN` of one
            example, or its means over queries, `N`. N may differ from layer to layer.
        tokens: What the queries are called, T of them; numbered by default.
        title: What to write above.

    Returns:
        The page.

    Raises:
        ValueError: If there is no layer, or a layer has another shape.

    Example:
        >>> entropy([[3.0, 1.5], [0.5, 2.0]])
        Page('Entropy of 2 layers × 2 heads', 0.1 MB)
    """
    where = "page.entropy"
    layers = per_layer(where, "entropies", entropies, "T", means=True)
    T = len(layers[0])
    names = {"tokens": named_tokens(where, "tokens", tokens, "T", T), "key_tokens": None}
    return assembly.summed("entropy", {**names, "title": title, "T": T, "S": T}, layers)


def mask(
    mask,
    length: int,
    key_length: int | None = None,
    *,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    block: int | None = None,
    title: str | None = None,
) -> Page:
    """Shows which query may attend to which key, in blocks and down to single pairs.

    The blocks are those of `jattn.block_table`: attention skips empty blocks, applies the
    mask in partial blocks, and needs no mask in full blocks. Zoom in to see each pair.

    Args:
        mask: What `jattn.attention` takes as `mask`, for one example and head; a
            `jattn.BlockTable` is shown with its own blocks.
        length: The number of queries, T.
        key_length: The number of keys, S; T by default.
        tokens: What the queries are called, T of them; numbered by default.
        key_tokens: What the keys are called, S of them; by default as the queries if T = S.
        block: How many queries and keys a block has; by default 128, or fewer for a mask
            that is shorter than eight such blocks.
        title: What to write above.

    Returns:
        The page.

    Raises:
        ValueError: If the mask does not fit these lengths, or one of them is below 1.

    Example:
        >>> mask(lambda b, n, t, s: t >= s, 1024)
        Page('Mask of 1024 queries × 1024 keys', 0.1 MB)
    """
    where = "page.mask"
    length, S = lengths(where, length, key_length)
    block = block if block is None else known_whole(where, "block", block, 1)
    names = _names(where, tokens, key_tokens, length, S)
    found = blocks_of(where, mask, length, S, block)
    title = title or f"Mask of {length} queries × {S} keys"
    arrays = {name: getattr(found, name) for name in ("kinds", "pattern_of", "patterns")}
    places, numbers = packed(arrays)
    facts = {
        "kind": "mask",
        "title": title,
        "T": length,
        "S": S,
        "block": found.block,
        "shares": shares(found.kinds),
        "why": found.why,
        "arrays": places,
        **(names if tokens is not None or key_tokens is not None else {}),
    }
    return document("mask.html", _MASK_SCRIPTS, facts, numbers)


def _size(where: str, megabytes) -> float:
    """Gives the largest size of a page, a number above 0."""
    number = known_number(megabytes)
    if number is None or not number > 0:  # NaN is no size either
        raise ValueError(
            f"{where}: `megabytes` must be a number above 0, got {megabytes!r}; give an "
            f"`int` or a `float`."
        )
    return number


def _names(where: str, tokens, key_tokens, T: int, S: int) -> dict[str, Any]:
    """Gives the tokens of queries and keys; None for keys with the queries' tokens."""
    queries = named_tokens(where, "tokens", tokens, "T", T)
    if key_tokens is None and T == S:
        return {"tokens": queries, "key_tokens": None}
    keys = named_tokens(where, "key_tokens", key_tokens, "S", S)
    return {"tokens": queries, "key_tokens": keys}
