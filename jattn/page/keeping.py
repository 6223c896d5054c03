"""The choice of weights for a page of a given size.

The strongest weight of each query always stays. The other weights stay if they reach a
threshold, which is the same for all heads. So a head that attends to one key takes little
room, and a head that attends to many keys gets the room that is left.
"""

from typing import NamedTuple

import numpy as np

from jattn.page.looks import Look
from jattn.page.packing import STEPS, codes, rounded

__all__ = ["Entries", "entries_of", "kept", "threshold"]


class Entries(NamedTuple):
    """The strongest weights of a layer, a row for each query of each head.

    Attributes:
        keys: The indices of the keys, rows × k.
        codes: The weights as in `packing.codes`; 0 where there is no weight.
    """

    keys: np.ndarray
    codes: np.ndarray


def entries_of(look: Look) -> Entries:
    """Gives the entries of one layer; a weight with code 0 counts as no weight."""
    k = look.indices.shape[-1]
    keys, weights = look.indices.reshape(-1, k), look.weights.reshape(-1, k)
    code = codes(np.where(keys >= 0, weights, 0))
    # Where indices fit into 16 bits, they take half the memory.
    small = np.uint16 if keys.max(initial=0) < 2**16 else np.uint32
    return Entries(keys.clip(0).astype(small), code)


def threshold(layers: list[Entries], most: int) -> int:
    """Finds the smallest code to keep, at least 1, so that about `most` entries stay.

    The first entry of each row stays in any case.
    """
    counts = np.zeros(STEPS + 1, np.int64)
    rows = 0
    for layer in layers:
        rows += np.count_nonzero(layer.codes[:, 0])
        counts += np.bincount(layer.codes[:, 1:].reshape(-1), minlength=STEPS + 1)
    above = np.cumsum(counts[:0:-1])  # how many reach the code STEPS, STEPS − 1, …
    fitting = np.searchsorted(above, most - rows, side="right")
    return max(STEPS + 1 - int(fitting), 1)


def kept(layers: list[Entries], least: int, coarse: bool) -> dict[str, np.ndarray]:
    """Makes the arrays of a page that hold the weights from `least` on.

    Args:
        layers: The entries of each layer.
        least: The smallest code to keep; the first entry of each row stays anyway.
        coarse: Whether to round the weights to eight bits.

    Returns:
        The number of entries of each row, their keys, and their weights as codes.
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
