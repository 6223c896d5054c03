"""What a picture is given: numbers, heads, tokens and lengths, checked."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import known_number
from jattn.arrays.integers import known_whole

__all__ = [
    "by_layer",
    "check_tokens",
    "heads_of",
    "lengths",
    "real_numbers",
    "shown_of",
]


def real_numbers(where: str, name: str, array) -> np.ndarray:
    """Gives real numbers in float64, also Boolean ones and those of a list.

    Raises:
        ValueError: If it holds anything else, or is traced.
    """
    try:
        found = np.asarray(array)
    except (TypeError, ValueError):  # of traced arrays, and of lists of unequal lengths
        found, got = None, type(array).__name__
    else:
        got = str(found.dtype)
    # NumPy has no kind for the floats of 8 and 16 bits that JAX adds.
    real = (jnp.floating, jnp.integer)
    if found is not None and (
        found.dtype.kind in "biuf"
        or (found.dtype.kind == "V" and any(jnp.issubdtype(found.dtype, x) for x in real))
    ):
        return found.astype(np.float64)
    raise ValueError(
        f"{where}: `{name}` must hold real numbers, known outside of `jit`, got {got}; "
        f"give an array of floats."
    )


def lengths(where: str, length, key_length) -> tuple[int, int]:
    """Checks how many queries and keys a picture of a mask has; as many keys by default."""
    length = known_whole(where, "length", length, 1)
    return length, known_whole(
        where, "key_length", length if key_length is None else key_length, 1
    )


def by_layer(where: str, entropies) -> tuple[np.ndarray, list[int]]:
    """Computes the mean entropy of each head, a row per layer; missing heads are NaN.

    Returns:
        The means, and how many heads each layer has.

    Raises:
        ValueError: If there is no layer, or one has no head or query.
    """
    # A single number is no layer, and so has no axis.
    many = isinstance(entropies, Iterable) and getattr(entropies, "ndim", 1) > 0
    entropies = entropies if many else [entropies]
    layers = [real_numbers(where, "entropies", layer) for layer in entropies]
    if not layers or any(layer.ndim == 0 or layer.size == 0 for layer in layers):
        raise ValueError(
            f"{where}: `entropies` must be one array BTN, TN or N for each layer, none of "
            f"them empty, got shapes {[layer.shape for layer in layers]}; give a list of "
            f"what `attention_entropy` returns."
        )
    counts = [layer.shape[-1] for layer in layers]
    means = np.full((len(layers), max(counts)), np.nan)
    for row, layer in zip(means, layers, strict=True):
        row[: layer.shape[-1]] = layer.reshape(-1, layer.shape[-1]).mean(axis=0)
    return means, counts


def shown_of(where: str, weights, query_tokens, key_tokens, heads):
    """Gives the weights to draw for each panel, the panels' names, and both sides' tokens.

    Raises:
        ValueError: If `weights` is not BNTS, NTS or TS, or tokens or heads do not fit it.
    """
    array = real_numbers(where, "weights", weights)
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(
            f"{where}: `weights` must be BNTS, NTS or TS with no axis of size 0, got "
            f"shape {array.shape}; give what `attention_weights` returns."
        )
    N, T, S = (1, *array.shape)[-3:]
    chosen = _chosen(where, heads, N)
    drawn = array.reshape(-1, N, T, S)[:, chosen]
    examples = [f"example {b}, " for b in range(len(drawn))] if len(drawn) > 1 else [""]
    names = [f"{example}head {head % N}" for example in examples for head in chosen]
    key_tokens = query_tokens if key_tokens is None and T == S else key_tokens
    check_tokens(where, "query_tokens", query_tokens, "T", T)
    check_tokens(where, "key_tokens", key_tokens, "S", S)
    names = names if array.ndim > 2 else [""]
    return drawn.reshape(-1, T, S), names, query_tokens, key_tokens


def heads_of(where: str, received, tokens, heads) -> tuple[np.ndarray, list[str]]:
    """Gives what the keys of one example receive, a row for each chosen head; and names.

    Raises:
        ValueError: If `received` is not SN or S, or tokens or heads do not fit it.
    """
    array = real_numbers(where, "received", received)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{where}: `received` must be SN or S, of one example and not empty, got shape "
            f"{array.shape}; take one example by its index."
        )
    S, N = array.shape[0], array.size // array.shape[0]
    check_tokens(where, "tokens", tokens, "S", S)
    chosen = _chosen(where, heads, N)
    names = [f"head {head % N}" for head in chosen] if array.ndim == 2 else [""]
    return array.reshape(S, N).T[chosen], names


def _chosen(where: str, heads, N: int) -> list[int]:
    if heads is None:
        return list(range(N))
    found = [known_number(head) for head in np.atleast_1d(np.asarray(heads, object))]
    chosen = [x for x in found if isinstance(x, int) and -N <= x < N]
    if not chosen or len(chosen) < len(found):
        raise ValueError(
            f"{where}: `heads` must be indices of the N={N} heads, whole numbers, got "
            f"{heads!r}; give a list of them."
        )
    return chosen


def check_tokens(where: str, name: str, tokens, letter: str, length: int) -> None:
    """Checks that tokens, if there are any, are a string for each query or key."""
    if tokens is None:
        return
    try:
        count = len(tokens)
    except TypeError:  # of a number, say, or of an array without axes
        got = type(tokens).__name__
    else:
        is_one = isinstance(tokens, str | bytes)
        got = "one string" if is_one else "" if count == length else str(count)
    if got:
        raise ValueError(
            f"{where}: `{name}` must have {letter}={length} tokens, got {got}; give one "
            f"string for each."
        )
