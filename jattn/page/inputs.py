"""Checks of what a page is made from: layers, options of each layer, and tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jattn.arrays.checks import check_array
from jattn.pictures.given import check_tokens, real_numbers

__all__ = ["layers_of", "named_tokens", "options_of", "per_layer"]


def layers_of(where: str, query, key) -> list[tuple[Any, Any]]:
    """Checks the query and key of each layer, which have one example.

    Raises:
        ValueError: If the layers do not fit together, or have several examples.
    """
    queries, keys = _sequence(query), _sequence(key)
    if not queries or len(queries) != len(keys):
        raise ValueError(
            f"{where}: `query` and `key` must have the same number of layers, at least "
            f"one, got {len(queries)} and {len(keys)}."
        )
    layers = []
    for layer in zip(queries, keys, strict=True):
        pair = [_one_example(where, *x) for x in zip(("query", "key"), layer, strict=True)]
        layers.append((pair[0], pair[1]))
    _check_lengths(where, layers)
    return layers


def options_of(where: str, options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gives each layer its options; a list or tuple has an option for each layer.

    Raises:
        ValueError: If a list or tuple has another length.
    """
    for name, option in options.items():
        if isinstance(option, list | tuple) and len(option) != count:
            raise ValueError(
                f"{where}: `{name}` is a list of {len(option)}, but there are {count} "
                f"layers; give one for each layer, or one that is not a list for all."
            )
    return [
        {name: x[i] if isinstance(x, list | tuple) else x for name, x in options.items()}
        for i in range(count)
    ]


def named_tokens(where: str, name: str, tokens, letter: str, length: int) -> list[str]:
    """Gives the tokens as text; without tokens, gives the places as numbers.

    Raises:
        ValueError: If there are more or fewer tokens than queries or keys.
    """
    check_tokens(where, name, tokens, letter, length)
    return [str(token) for token in (range(length) if tokens is None else tokens)]


def per_layer(
    where: str, name: str, layers, letter: str, *, means: bool = False
) -> list[np.ndarray]:
    """Checks arrays of numbers by position and head, one for each layer.

    Args:
        where: The name of the public function, for messages.
        name: The name of its argument.
        layers: One array or a sequence of arrays; an axis of one example may come first.
        letter: The letter of the axis of positions, T or S.
        means: Whether an array may be means over positions, without this axis.

    Returns:
        Positions × heads in float64, or 1 × heads of means.

    Raises:
        ValueError: If there is no layer, or one does not fit.
    """
    # A list of numbers is one array; any other list has an array for each layer.
    has_axes = lambda x: isinstance(x, list | tuple) or np.ndim(x) > 0
    is_many = isinstance(layers, list | tuple) and (not layers or has_axes(layers[0]))
    arrays = [real_numbers(where, name, x) for x in (layers if is_many else [layers])]
    arrays = [x[0] if x.ndim == 3 and len(x) == 1 else x for x in arrays]
    one_axis = (lambda x: x[None]) if means else (lambda x: x[:, None])
    arrays = [one_axis(x) if x.ndim == 1 else x for x in arrays]
    lengths = {x.shape[:1] for x in arrays}
    if not arrays or any(x.ndim != 2 or not x.size for x in arrays) or len(lengths) > 1:
        alone = "N" if means else letter
        raise ValueError(
            f"{where}: `{name}` must be {letter}N or {alone}, of one example and not "
            f"empty, or one such array for each layer, all of one length {letter}; got "
            f"shapes {[x.shape for x in arrays]}; take one example by its index."
        )
    return arrays


def _sequence(arrays) -> Sequence:
    return arrays if isinstance(arrays, list | tuple) else [arrays]


def _one_example(where: str, name: str, array):
    array = check_array(where, name, array)
    letters = "TNH" if name == "query" else "SKH"
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[0] != 1):
        raise ValueError(
            f"{where}: `{name}` must be {letters} of one example, or a list of one such "
            f"array for each layer, got shape {array.shape}; take one example by its index."
        )
    return array


def _check_lengths(where: str, layers) -> None:
    found = {(query.shape[-3], key.shape[-3]) for query, key in layers}
    if len(found) > 1 or 0 in next(iter(found)):
        raise ValueError(
            f"{where}: all layers must have the same T queries and S keys, at least one of "
            f"each, got (T, S) = {sorted(found)}."
        )
    heads = {query.shape[-2] for query, _ in layers}
    if 0 in heads:
        raise ValueError(f"{where}: `query` must have a head in each layer, got N=0.")
