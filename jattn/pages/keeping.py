"""Which weights stay on a page, so that it has the size asked for.

The strongest weight of each query always stays. Of the others those stay that are above
one threshold, the same for all heads: a head that looks at one key takes little room, and
leaves it to a head that looks at many.
"""

from typing import NamedTuple

import numpy as np

from jattn.pages.looks import Look
from jattn.pages.packing import STEPS, codes, rounded

__all__ = ["Entries", "entries_of", "kept", "threshold"]


class Entries(NamedTuple):
    """The strongest weights of all heads and queries, a row for each head of each query.

    Attributes:
        keys: The indices of the keys, rows × k; k is the largest of all layers.
        codes: The weights as in `packing.codes`; 0 where there is none.
    """

    keys: np.ndarray
    codes: np.ndarray


def entries_of(look: Look) -> Entries:
    """Gives the entries of one layer; a weight next to nothing is none."""
    k = look.indices.shape[-1]
    keys, weights = look.indices.reshape(-1, k), look.weights.reshape(-1, k)
    code = codes(np.where(keys >= 0, weights, 0))
    small = np.uint16 if keys.max(initial=0) < 2**16 else np.uint32  # half the memory
    return Entries(keys.clip(0).astype(small), code)


def threshold(layers: list[Entries], most: int) -> int:
    """Finds the least code that stays, so that about `most` entries do, at least 1.

    Of each row the first stays anyway.
    """
    counts = np.zeros(STEPS + 1, np.int64)
    rows = 0
    for layer in layers:
        rows += np.count_nonzero(layer.codes[:, 0])
        counts += np.bincount(layer.codes[:, 1:].reshape(-1), minlength=STEPS + 1)
    above = np.cumsum(counts[:0:-1])  # how many have at least the code STEPS, STEPS − 1, …
    fitting = np.searchsorted(above, most - rows, side="right")
    return max(STEPS + 1 - int(fitting), 1)


def kept(layers: list[Entries], least: int, coarse: bool) -> dict[str, np.ndarray]:
    """Makes the arrays of a page that hold the weights from `least` on.

    Args:
        layers: The entries of each layer.
        least: The smallest code to keep, beside the first of each row.
        coarse: Whether to round the weights to eight bits.

    Returns:
        How many entries each row has, their keys, and their weights as codes.
    """
    counts, keys, weights = [], [], []
    for layer in layers:
        stays = layer.codes >= least
        stays[:, 0] = layer.codes[:, 0] > 0
        counts.append(stays.sum(axis=1))
        keys.append(layer.keys[stays].astype(np.uint32))
        weights.append(rounded(layer.codes[stays]) if coarse else layer.codes[stays])
    arrays = {"counts": counts, "keys": keys, "weights": weights}
    return {name: np.concatenate(parts) for name, parts in arrays.items()}
