"""What one layer attends to: its strongest weights, and sums of all weights.

No array here is T × S. The small picture of a head has a cell for each pair of a short
text, and 32 × 32 cells for a long text. A cell is the mean over its queries of the weight
on all of its keys. The sums over keys are computed by attention itself, with values that
say in which cell each key lies:

    value[s, c] = 1 where key s lies in cell c, else 0
    output[t, c] = Σₛ weight[t, s] · value[s, c] = the weight of query t on cell c
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jattn.api.attention import attention_state
from jattn.api.strongest import strongest_keys
from jattn.api.views import attention_entropy, attention_received

__all__ = ["Look", "cell_of", "look"]

# Cells along a side of a small picture. It is about 40 pixels wide, because a dozen
# pictures stand side by side.
_CELLS = 32
_SHORT = 64  # longest text with a cell for each pair; the larger picture shows them well


class Look(NamedTuple):
    """Summaries of one layer; the first axis has its N heads, then their mean.

    Attributes:
        indices: The indices of the strongest keys, heads × T × k; −1 where there is none.
        weights: The weights of these keys.
        received: What each key receives, heads × S.
        entropy: The entropy of each query's weights, heads × T, in nats.
        pictures: The weights in cells, heads × rows × columns.
    """

    indices: np.ndarray
    weights: np.ndarray
    received: np.ndarray
    entropy: np.ndarray
    pictures: np.ndarray


def look(query, key, k: int, options) -> Look:
    """Summarises the weights of one example in one layer.

    Args:
        query: `TNH`, or `1TNH`.
        key: `SKH`, or `1SKH`.
        k: How many of the strongest keys to find for each query.
        options: The options of `attention`, without dropout.

    Returns:
        The summaries, as NumPy arrays.
    """
    logsumexp, pictures = _pictures(query, key, options)
    options = {**options, "logsumexp": logsumexp}
    N = query.shape[-2]
    strongest = strongest_keys(query, key, k, **options)
    indices, weights = (np.asarray(x).reshape(-1, N, k).swapaxes(0, 1) for x in strongest)
    # The strongest keys of the mean need not be among the strongest of any one head, so
    # they are searched separately.
    average = strongest_keys(query, key, k, average=True, **options)
    both = lambda heads, mean: np.concatenate([heads, np.asarray(mean).reshape(1, -1, k)])
    by_head = lambda x: with_mean(np.asarray(x).reshape(-1, N).T)
    return Look(
        both(indices, average.indices),
        both(weights, average.weights),
        by_head(attention_received(query, key, **options)),
        by_head(attention_entropy(query, key, **options)),
        with_mean(pictures),
    )


def cell_of(T: int, S: int) -> tuple[int, int]:
    """Computes how many queries and how many keys a cell of a small picture has."""
    if max(T, S) <= _SHORT:
        return 1, 1
    return math.ceil(T / _CELLS), math.ceil(S / _CELLS)


def _pictures(query, key, options):
    """Computes the logsumexp of the logits, and the weights of each head in cells."""
    T, S, K = query.shape[-3], key.shape[-3], key.shape[-2]
    rows, columns = cell_of(T, S)
    cell = np.arange(S) // columns
    is_inside = cell[:, None] == np.arange(cell[-1] + 1)
    value = jnp.broadcast_to(is_inside[:, None], (*key.shape[:-3], S, K, cell[-1] + 1))
    state = attention_state(query, key, value.astype(query.dtype), **options)
    # A sink reduces the output only: the logsumexp is over the keys alone.
    sums = np.asarray(state.output, np.float32)
    sums = sums.reshape(T, -1, cell[-1] + 1).swapaxes(0, 1)  # head × query × cell
    starts = np.arange(0, T, rows)
    counts = np.diff(starts, append=T)
    return state.logsumexp, np.add.reduceat(sums, starts, axis=1) / counts[:, None]


def with_mean(heads: np.ndarray) -> np.ndarray:
    """Gives what each head has, and after the last head their mean."""
    return np.concatenate([heads, heads.mean(axis=0, keepdims=True)])
