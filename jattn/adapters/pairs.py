"""Masks and biases as other libraries' layers give them."""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import check_array, check_flag
from jattn.arrays.shapes import wide_dtype
from jattn.masks import Causal, Mask, as_mask
from jattn.masks.mask import is_function
from jattn.pytree import pytree


def any_mask(where: str, mask, query=None, key=None) -> Mask | None:
    """Makes a mask from a function or an array; the array is Boolean, or ones and zeros.

    With the heads of queries and keys, an array is read as `by_last_axes` says.

    Raises:
        ValueError: If it is an array with a negative number, and its numbers are known:
            such an array is made to be added to the logits, where 0 means "may attend".
    """
    if mask is None or isinstance(mask, Mask) or is_function(mask):
        return None if mask is None else as_mask(mask, where)
    array = check_array(where, "mask", mask)
    if array.dtype != jnp.bool_ and not isinstance(mask, jax.core.Tracer):
        least = np.min(np.asarray(mask, np.float64), initial=0)
        if not least >= 0:
            raise ValueError(
                f"{where}: `mask` must be Boolean, or of ones and zeros (not 0 = may "
                f"attend), got {least} in it; a mask to be added to the logits belongs in "
                f"`bias`, or give `mask >= 0`."
            )
    array = array.astype(bool)
    return as_mask(array if query is None else by_last_axes(array, query, key), where)


def any_bias(where: str, bias, query, key) -> jax.Array | None:
    """Checks a bias and reads it as `by_last_axes` says; whole numbers become floating."""
    if bias is None:
        return None
    bias = by_last_axes(check_array(where, "bias", bias), query, key)
    is_whole = jnp.issubdtype(bias.dtype, jnp.integer)
    return bias.astype(wide_dtype(query.dtype)) if is_whole else bias


def by_last_axes(array: jax.Array, query, key) -> jax.Array:
    """Adds the leading axes that an array lacks, if it broadcasts to the logits.

    Other libraries read an array NTS by head, also where there are as many examples; jattn
    would ask which is meant. An array that does not fit stays as it is, for the message.
    """
    *batch, T, N, _ = query.shape
    full = *batch, N, T, key.shape[-3]
    padded = (1,) * (len(full) - array.ndim) + array.shape
    sizes = zip(padded, full, strict=False)
    fits = all(have == 1 or have == want for have, want in sizes)
    return array.reshape(padded) if fits else array


def joined(where: str, masks, query=None, key=None) -> Mask | None:
    """Joins the masks that are not None by `&`, each as in `any_mask`; None if none is."""
    given = [any_mask(where, mask, query, key) for mask in masks if mask is not None]
    return reduce(operator.and_, given) if given else None


@pytree()
class CausalRows(Mask):
    """A mask in which no row sees a later column, whatever the positions are."""

    def aligned(self, sizes) -> Any:
        """Gives the number of each row and column."""
        row, column = (jnp.arange(x, dtype=jnp.int32) for x in (sizes.T, sizes.S))
        return row.reshape(1, 1, -1, 1), column.reshape(1, 1, 1, -1)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether the column is not after the row."""
        row, column = elements
        return column <= row


def causal(where: str, is_causal, options: dict[str, Any]) -> Mask | None:
    """Makes the lower triangle from the top left corner, which layers mean by causal.

    If positions are given, `Causal` would compare them; so rows and columns are compared.
    """
    if not check_flag(where, "is_causal", is_causal):
        return None
    placed = any(options.get(f"{side}_position") is not None for side in ("query", "key"))
    return CausalRows() if placed else Causal()
