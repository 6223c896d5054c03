"""Arguments of other libraries' layers, translated to arguments of `jattn.attention`."""

import contextlib
import functools
import inspect
import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.api.attention import attention
from jattn.api.weights import attention_weights
from jattn.arrays.checks import check_array
from jattn.dropout import Dropout
from jattn.masks import Causal, Mask, as_mask
from jattn.pytree import pytree


def attend(
    where: str,
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    dropout: Dropout | None = None,
    precision=None,
    sow=None,
    options: dict[str, Any],
) -> jax.Array:
    """Attends; first hands the weights BNTS, without dropout, to `sow` if it is given."""
    with _precise(where, precision):
        if sow is not None:  # only `attention` has a choice of implementation
            others = {k: x for k, x in options.items() if k != "implementation"}
            weights = attention_weights(query, key, mask=mask, bias=bias, **others)
            sow(weights.astype(query.dtype))
        return attention(
            query, key, value, mask=mask, bias=bias, dropout=dropout, **options
        )


def extend(
    where: str, kv, query, key, value, *, mask=None, count=None, precision=None, options
):
    """Appends tokens to a cache and attends from them, each to itself and those before.

    Args:
        where: The layer, for messages.
        kv: A cache of `jattn.caches`, of any kind that has `extend`.
        query: `BTNH`.
        key: `BTKH`.
        value: `BTKD`.
        mask: A further mask; an array has the cache's capacity as its columns.
        count: See `caches.Cache.append`.
        precision: As in `attend`.
        options: As in `attend`.

    Returns:
        The output, `BTND`, and the cache with the tokens.
    """
    mask = both(Causal(), any_mask(where, mask))
    with _precise(where, precision):
        return kv.extend(query, key, value, count=count, mask=mask, **options)


def decoding(where: str, attention_fn, ours, mask) -> tuple[Any, dict[str, Any]]:
    """Gives the mask of decoding, and the options that a layer's `attention_fn` adds.

    `functools.partial` may have added options and a second mask to `ours`. Decoding has
    them too, so that it gives what the whole gives. Positions are left out: a cache counts
    its tokens itself.
    """
    mask = any_mask(where, mask)
    if not isinstance(attention_fn, functools.partial) or attention_fn.func is not ours:
        return mask, {}
    # The layer gives what `ours` names, but for these two.
    given = set(inspect.signature(ours).parameters) - {"and_mask", "bias"}
    left_out = given | {"and_mask", "query_position", "key_position"}
    added = attention_fn.keywords
    mask = both(mask, any_mask(where, added.get("and_mask")))
    return mask, {k: x for k, x in added.items() if k not in left_out}


def check_count(where: str, count) -> None:
    """Raises for a `count` outside of decoding, where it would do nothing."""
    if count is not None:
        raise ValueError(
            f"{where}: `count` must be left out unless the layer decodes, got {count}; "
            f"hide keys that do not count with `mask`."
        )


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


def causal(options: dict[str, Any]) -> Mask:
    """Makes the lower triangle from the top left corner, which layers mean by causal.

    If positions are given, `Causal` would compare them; so rows and columns are compared.
    """
    placed = any(options.get(f"{side}_position") is not None for side in ("query", "key"))
    return CausalRows() if placed else Causal()


def any_mask(where: str, mask) -> Mask | None:
    """Makes a mask from a function or an array; the array is Boolean, or ones and zeros.

    Raises:
        ValueError: If it is an array with a negative number, and its numbers are known:
            such an array is made to be added to the logits, where 0 means "may attend".
    """
    if mask is None or isinstance(mask, Mask) or callable(mask):
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
    return as_mask(array.astype(bool), where)


def both(*masks: Mask | None) -> Mask | None:
    """Joins the masks that are not None by `&`; None if there are none."""
    given = [mask for mask in masks if mask is not None]
    return reduce(operator.and_, given) if given else None


def dropout(where: str, rate, rng, deterministic, shared=False) -> Dropout | None:
    """Makes the dropout of a layer; None if it is off."""
    if deterministic or (isinstance(rate, int | float | np.number) and rate == 0):
        return None
    if rng is None:
        raise ValueError(
            f"{where}: dropout at rate {rate} needs a random key, got None; give one, or "
            f"switch dropout off."
        )
    return Dropout(rate, rng, shared)


def check_step(where: str, query, key, and_mask, options) -> None:
    """Refuses a decoding step whose single query has no position, if positions matter.

    The query could be at any place among the keys; a guess would be wrong in silence.
    """
    reads_positions = and_mask is not None or options.get("modifier") is not None
    one, many = query.shape[-3], key.shape[-3]
    if reads_positions and one == 1 < many and options.get("query_position") is None:
        raise ValueError(
            f"{where}: a mask or modifier of positions must be told where a single query "
            f"stands among {many} keys, got no position; give `query_position`, or 0 if "
            f"nothing depends on it."
        )


def _precise(where: str, precision):
    """Makes a context in which products have a precision, as `jax.lax` names it."""
    if precision is None:
        return contextlib.nullcontext()
    pair = precision if isinstance(precision, tuple | list) else (precision,)
    names = {_name(where, one) for one in pair}
    if len(names) > 1:
        raise ValueError(
            f"{where}: `precision` must be the same for both sides of a product, got "
            f"{precision!r}; give one."
        )
    return jax.default_matmul_precision(names.pop())


def _name(where: str, precision) -> str:
    """Translates a precision to a name that `jax.default_matmul_precision` accepts."""
    if isinstance(precision, lax.DotAlgorithmPreset):
        return precision.name
    if isinstance(precision, str) and precision in lax.DotAlgorithmPreset.__members__:
        return precision
    try:
        return lax.Precision(precision).name.lower()
    except ValueError:
        raise ValueError(
            f"{where}: `precision` must be a `jax.lax.Precision`, a "
            f"`jax.lax.DotAlgorithmPreset` or the name of one, got {precision!r}."
        ) from None
