"""The pages of heads: the facts and the arrays that their scripts read.

All three pages have the same script, which shows what the page contains. The number of a
head in all arrays is its *slot*. Slots are the heads of the first layer, the mean over
these heads, then the heads of the second layer, and so on.
"""

from typing import Any

import numpy as np

from jattn.page.document import Page, document
from jattn.page.keeping import Entries, entries_of, kept, threshold
from jattn.page.looks import cell_of, look, with_mean
from jattn.page.packing import bytes_of, codes, packed, rounded, shares

__all__ = ["SCRIPTS", "attending", "fitted", "summed"]

SCRIPTS = (
    *("unpack.js", "numbers.js", "theme.js", "colours.js", "map.js", "text.js"),
    *("lines.js", "panel.js", "heads.js"),
)
_STRONGEST = 16  # keys found for each query of a long text; its page has room for fewer
_MOST_WEIGHTS = 2**22  # with so many weights or fewer, none is left out
_BYTES_OF_ENTRY = 2.4  # first guess, compressed and in base 64; `_ROUNDS` rounds correct it
_ROUNDS = 5  # of this correction; no case took more than three
_FULL_ENOUGH = 0.9  # of the size asked for: then another round is not worth its time


def attending(where: str, facts: dict[str, Any], layers, options, limit: float) -> Page:
    """Makes the page of weights.

    Args:
        where: The name of the public function, for messages.
        facts: The title or None, the tokens, T and S.
        layers: The query and key of each layer.
        options: The options of each layer.
        limit: The largest size of the page in bytes.

    Returns:
        The page.
    """
    heads = [query.shape[-2] for query, _ in layers]
    k = min(facts["S"], max(_STRONGEST, _MOST_WEIGHTS // (facts["T"] * _slots(heads))))
    looks, entries = [], []
    for (query, key), each in zip(layers, options, strict=True):
        seen = look(query, key, k, each)
        entries.append(entries_of(seen))
        # Only entries are kept: indices and weights are large arrays for a long text.
        looks.append((seen.received, seen.entropy, seen.pictures))
    received, spread, pictures = (
        np.concatenate(parts) for parts in zip(*looks, strict=True)
    )
    received_facts, received_arrays = _by_slot("received", received)
    spread_facts, spread_arrays = _by_slot("entropy", spread)
    facts = {
        "kind": "weights",
        "heads": heads,
        **facts,
        **received_facts,
        **spread_facts,
        "title": facts["title"] or f"Attention of {_size(heads)}, {_length(facts)}",
        "cells": list(pictures.shape[1:]),
        "cell": cell_of(facts["T"], facts["S"]),
        "all_keys": k == facts["S"],
        "sink": any(each["sink"] is not None for each in options),
    }
    arrays = {**received_arrays, **spread_arrays, "pictures": bytes_of(pictures)}
    return fitted(where, facts, arrays, entries, limit)


def summed(kind: str, facts: dict[str, Any], layers: list[np.ndarray]) -> Page:
    """Makes the page of what tokens receive, or of entropies.

    Args:
        kind: `"received"` or `"entropy"`.
        facts: The title or None, the tokens, T and S.
        layers: Positions × heads for each layer; 1 × heads if they are means.

    Returns:
        The page.
    """
    heads = [layer.shape[1] for layer in layers]
    slots = np.concatenate([with_mean(layer.T) for layer in layers])
    found, arrays = _by_slot(kind, slots)
    of = f"Received by {_length(facts)}," if kind == "received" else "Entropy of"
    title = facts["title"] or f"{of} {_size(heads)}"
    facts = {"kind": kind, "heads": heads, **facts, **found, "title": title}
    return _written(facts, arrays)


def fitted(
    where: str, facts: dict[str, Any], arrays, layers: list[Entries], limit: float
) -> Page:
    """Makes the page with as many weights as fit into its size.

    Args:
        where: The name of the public function, for messages.
        facts: The facts of the page.
        arrays: The arrays of the page, without the weights.
        layers: The strongest weights of each layer.
        limit: The largest size of the page in bytes.

    Returns:
        The page.

    Raises:
        ValueError: If it is too large even with one weight for each query and head.
    """
    every = sum(int(np.count_nonzero(layer.codes)) for layer in layers)
    best = None
    rest = len(_written(facts, arrays).html)
    coarse = rest + 2 * every * _BYTES_OF_ENTRY > limit  # all digits take twice the bytes
    if coarse:
        rest = len(_written(facts, _rounded(arrays)).html)
    room = limit - rest
    most = every if not coarse else min(every, int(room / _BYTES_OF_ENTRY))
    for _ in range(_ROUNDS):
        start = threshold(layers, most)
        page = _with_weights(facts, arrays, layers, start, coarse)
        size = len(page.html)
        if size <= limit and (best is None or size > len(best.html)):
            best = page
        if size <= limit and (start == 1 or size > _FULL_ENOUGH * limit):
            break
        # 3 % less than in proportion, so that the next round fits.
        most = min(every, int(0.97 * most * room / max(size - rest, 1)))
        coarse = True
    if best is None:  # above every code: only the first entry of each row stays
        best = _with_weights(facts, arrays, layers, 2**16, True)
    if len(best.html) > limit:
        raise ValueError(
            f"{where}: the page takes {len(best.html) / 1e6:.1f} MB with one weight for "
            f"each query and head, and `megabytes` is {limit / 1e6:g}; give fewer layers, "
            f"a shorter text, or more megabytes."
        )
    return best


def _with_weights(facts, arrays, layers, least: int, coarse: bool) -> Page:
    held = kept(layers, least, coarse)
    facts = {
        **facts,
        "held": _held(facts, held),
        "complete": bool(least == 1 and facts["all_keys"]),
        "exact": not coarse,
    }
    return _written(facts, {**(_rounded(arrays) if coarse else arrays), **held})


def _rounded(arrays):
    """Rounds the arrays to fewer digits, except pictures, which have one byte anyway."""
    return {x: y if y.dtype == np.uint8 else rounded(y) for x, y in arrays.items()}


def _held(facts, held) -> float:
    """Computes the share of all weights of all heads that is on the page.

    The slots of means over heads do not count.
    """
    is_head = np.concatenate([np.arange(count + 1) < count for count in facts["heads"]])
    slot = np.repeat(np.arange(held["counts"].size) // facts["T"], held["counts"])
    found = np.bincount(slot, shares(held["weights"]), len(is_head))[is_head].sum()
    every = facts["S"] * np.nansum(np.array(facts["received"]["mean"], float)[is_head])
    return min(float(found / every), 1.0) if every else 1.0


def _by_slot(name: str, numbers: np.ndarray) -> tuple[dict, dict]:
    """Turns numbers by slot and position into facts of each slot, and codes.

    The codes are the shares of the largest number of the slot.
    """
    tops = np.max(numbers, axis=1, initial=0.0, where=np.isfinite(numbers))
    tops = np.where(tops > 0, tops, 1.0)
    facts = {"top": _plain(tops), "mean": _plain(numbers.mean(axis=1))}
    return {name: facts}, {name: codes(numbers / tops[:, None])}


def _written(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> Page:
    where, numbers = packed(arrays)
    return document("heads.html", SCRIPTS, {**facts, "arrays": where}, numbers)


def _slots(heads: list[int]) -> int:
    return sum(heads) + len(heads)


def _size(heads: list[int]) -> str:
    """Says how many heads there are: `30 layers × 9 heads`."""
    alike = "–".join(map(str, sorted({min(heads), max(heads)})))
    count = f"{alike} {'head' if alike == '1' else 'heads'}"
    return count if len(heads) == 1 else f"{len(heads)} layers × {count}"


def _length(facts) -> str:
    """Says how long the text is, or how long both texts are: `4000 tokens`."""
    T, S = facts["T"], facts["S"]
    if facts["key_tokens"] is None:
        return f"{T} {'token' if T == 1 else 'tokens'}"
    queries, keys = "query" if T == 1 else "queries", "key" if S == 1 else "keys"
    return f"{T} {queries}, {S} {keys}"


def _plain(numbers: np.ndarray) -> list[float | None]:
    """Prepares numbers for JSON: six digits, and None for NaN and infinity."""
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in numbers]
