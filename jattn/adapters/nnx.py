"""`jattn.attention` as the `attention_fn` of `flax.nnx.MultiHeadAttention`."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from jattn.adapters import layer

__all__ = ["attention"]

WHERE = "nnx.attention"


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module: Any = None,
    promote_dtype=dtypes.promote_dtype,
    is_causal=False,
    *,
    input_positions=None,
    and_mask=None,
    **options,
) -> jax.Array:
    """Attends like `flax.nnx.dot_product_attention`, for `attention_fn=` of a layer.

        nnx.MultiHeadAttention(…, attention_fn=jattn.adapters.nnx.attention)

    The layer keeps its parameters, outputs and gradients. `functools.partial` adds options
    that flax lacks: `partial(attention, modifier=ALiBi(), and_mask=Window(512, 0))`.

    The differences from flax (0.12) are:

    - A query that sees no key has output 0 and gradient 0. In flax the output is the mean
      of the values.
    - Decoding with `is_causal=True` attends to every key of the cache so far; flax before
      0.12.12 attends to the first one only. So `is_causal` is ignored if there are a mask,
      one query and more than one key.
    - Dropout has the same probability, but drops other weights. With `broadcast_dropout` it
      drops the same weights in all examples and heads, as in flax.
    - `precision` is used with and without dropout; the softmax is in float32 at least.

    Args:
        query: `…TNH`; any number of batch axes, or none.
        key: `…SKH`; N is a multiple of K.
        value: `…SKD`.
        bias: Added to the logits; broadcasts to `…NTS`.
        mask: True or not 0 = may attend; broadcasts to `…NTS`. Or one of `jattn.masks`, or
            a function (b, n, t, s) → bool, as in `layer(x, mask=Causal())`. A floating mask
            to be added to the logits (0 and −∞) means the opposite. It is refused where its
            numbers are known; inside `jit` they are not known.
        broadcast_dropout: Whether one draw serves all examples and heads.
        dropout_rng: The random key of dropout.
        dropout_rate: The probability that a weight is dropped.
        deterministic: Whether nothing is dropped.
        dtype: The dtype to convert the inputs to; by default the one they promote to.
        precision: The precision of products, the same for both sides of a product.
        module: If given, all T × S weights are sown in it as `attention_weights`.
        promote_dtype: Converts the tuple of inputs.
        is_causal: Whether the t-th query sees only the keys s ≤ t.
        input_positions: `…T`: the positions of queries for masks and modifiers. If there
            are as many keys, they have the same positions; otherwise keys count from 0, as
            in a cache.
        and_mask: A second mask that must allow a pair too. It is for `functools.partial`,
            because the layer itself always gives `mask`.
        **options: `modifier`, `sink`, `scale`, `query_position`, `key_position` and
            `implementation` of `jattn.attention`.

    Returns:
        The output, `…TND`, in the dtype of the converted inputs.

    Raises:
        ValueError: If an argument does not fit; the message says what to do. Also if a
            single query decodes with `modifier` or `and_mask`, and no option gives its
            position.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    options = _placed(options, input_positions, query, key)
    reads_positions = and_mask is not None or options.get("modifier") is not None
    layer.check_step(WHERE, query, key, reads_positions, options)
    # In decoding the mask already says which keys of the cache are filled.
    decodes = query.shape[-3] == 1 < key.shape[-3] and mask is not None
    sow = lambda weights: module.sow(nnx.Intermediate, "attention_weights", weights)
    return layer.attend(
        WHERE,
        query,
        key,
        value,
        bias=bias,
        mask=layer.both(
            layer.causal(options) if is_causal and not decodes else None,
            layer.any_mask(WHERE, mask),
            layer.any_mask(WHERE, and_mask),
        ),
        dropout=layer.dropout(
            WHERE, dropout_rate, dropout_rng, deterministic, broadcast_dropout
        ),
        precision=precision,
        sow=None if module is None else sow,
        options=options,
    )


def _placed(options, input_positions, query, key):
    """Adds the positions that the layer gave to the options."""
    if input_positions is None:
        return options
    if options.get("query_position") is not None:
        raise ValueError(
            f"{WHERE}: positions must come from one place, got both `input_positions` and "
            f"`query_position`; leave one out."
        )
    options = {**options, "query_position": input_positions}
    if query.shape[-3] == key.shape[-3]:
        options.setdefault("key_position", input_positions)
    return options
