"""Arguments of other libraries' layers, translated to arguments of `jattn.attention`."""

import contextlib
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jattn.adapters import pairs
from jattn.api.attention import attention
from jattn.api.weights import attention_weights
from jattn.arrays.checks import check_flag, known_number
from jattn.arrays.positions import positions
from jattn.arrays.shapes import measure
from jattn.dropout import Dropout
from jattn.masks import Causal


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
    sown_dtype=None,
    options: dict[str, Any],
) -> jax.Array:
    """Attends; first hands the weights BNTS, without dropout, to `sow` if it is given.

    They have `sown_dtype`, that of the query by default.
    """
    bias = pairs.any_bias(where, bias, query, key)
    with _precise(where, precision):
        if sow is not None:  # only `attention` has a choice of implementation
            others = {k: x for k, x in options.items() if k != "implementation"}
            weights = attention_weights(query, key, mask=mask, bias=bias, **others)
            sow(weights.astype(query.dtype if sown_dtype is None else sown_dtype))
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
    mask = pairs.joined(where, (Causal(), mask))
    with _precise(where, precision):
        return kv.extend(query, key, value, count=count, mask=mask, **options)


def decoding(where: str, attention_fn, ours, mask) -> tuple[Any, dict[str, Any]]:
    """Gives the mask of decoding, and the options that a layer's `attention_fn` adds.

    `functools.partial` may have added options and a second mask to `ours`. Decoding has
    them too, so that it gives what the whole gives. Positions are left out: a cache counts
    its tokens itself.
    """
    if not isinstance(attention_fn, functools.partial) or attention_fn.func is not ours:
        return pairs.any_mask(where, mask), {}
    # The layer gives what `ours` names, but for these two.
    given = set(inspect.signature(ours).parameters) - {"and_mask", "bias"}
    left_out = given | {"and_mask", "query_position", "key_position"}
    added = attention_fn.keywords
    mask = pairs.joined(where, (mask, added.get("and_mask")))
    return mask, {k: x for k, x in added.items() if k not in left_out}


def flag(where: str, name: str, *values) -> bool | None:
    """Gives the first of several settings that is not None, which is True or False."""
    given = [x for x in values if x is not None]
    return check_flag(where, name, given[0]) if given else None


def check_count(where: str, count) -> None:
    """Raises for a `count` outside of decoding, where it would do nothing."""
    if count is not None:
        raise ValueError(
            f"{where}: `count` must be left out unless the layer decodes, got {count}; "
            f"hide keys that do not count with `mask`."
        )


def one_batch(*heads: jax.Array) -> list[jax.Array]:
    """Broadcasts the batch axes of heads, `…TNH`, to common ones."""
    if len({x.shape[:-3] for x in heads}) == 1:
        return list(heads)
    batch = jnp.broadcast_shapes(*(x.shape[:-3] for x in heads))
    return [jnp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in heads]


def placed(where: str, options: dict[str, Any], input_positions, query, key):
    """Adds the positions that a layer gave to the options."""
    if input_positions is None:
        return options
    if options.get("query_position") is not None:
        raise ValueError(
            f"{where}: positions must come from one place, got both `input_positions` and "
            f"`query_position`; leave one out."
        )
    sizes = measure(where, query, key, key)
    positions(where, "input_positions", input_positions, sizes, "T")  # only checked
    options = {**options, "query_position": input_positions}
    if query.shape[-3] == key.shape[-3]:
        options.setdefault("key_position", input_positions)
    return options


def dropout(
    where: str, rate, rng, deterministic, shared=False, *, name: str = "dropout_rate"
) -> Dropout | None:
    """Makes the dropout of a layer, whose rate has a `name`; None if it is off."""
    shared = check_flag(where, "broadcast_dropout", shared)
    if check_flag(where, "deterministic", deterministic) or known_number(rate) == 0:
        return None
    if not 0 < (known_number(rate) or -1) < 1:
        raise ValueError(
            f"{where}: `{name}` must be a known number in [0, 1), got {rate!r}; give a "
            f"`float`."
        )
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
