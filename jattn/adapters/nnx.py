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

    The layer keeps its parameters, outputs and gradients. `functools.partial` adds what
    flax lacks, such as `partial(attention, modifier=ALiBi(), and_mask=Window(512, 0))`.

    It differs from flax (0.12) in this:

    - A query that sees no key has output 0 and gradient 0, not the mean of the values.
    - Decoding with `is_causal=True` attends to every key of the cache so far; flax before
      0.12.12 attends to the first one only. So with a mask, one query and more keys,
      `is_causal` adds nothing.
    - Dropout drops with the same probability and, with `broadcast_dropout`, alike in all
      examples and heads, but its draws are others.
    - `precision` is honoured, also without dropout; the softmax is in float32 at least.

    Args:
        query: `…TNH`; any number of batch axes, none too.
        key: `…SKH`; N is a multiple of K.
        value: `…SKD`.
        bias: Added to the logits; broadcasts to `…NTS`.
        mask: True or not 0 = may attend; broadcasts to `…NTS`. Or one of `jattn.masks`, or
            a function (b, n, t, s) → bool, as in `layer(x, mask=Causal())`. A floating one
            that is to be added (0 and −∞) means the opposite: it is refused where its
            numbers are known, and inside `jit` they are not.
        broadcast_dropout: Whether one draw serves all examples and heads.
        dropout_rng: The random key of dropout.
        dropout_rate: The probability that a weight is dropped.
        deterministic: Whether nothing is dropped.
        dtype: What the inputs are converted to; by default what they promote to.
        precision: Of the products, one for both of their sides.
        module: Where the weights are sown as `attention_weights`, if given: T × S of them.
        promote_dtype: Converts the tuple of inputs.
        is_causal: Whether the t-th query sees only the keys s ≤ t.
        input_positions: `…T`: where the queries stand, and the keys if there are as many,
            for masks and modifiers; else keys count from 0, as those of a cache do.
        and_mask: A mask that must allow it too, for `functools.partial`: the layer itself
            always gives `mask`.
        **options: `modifier`, `sink`, `scale`, `query_position`, `key_position` and
            `implementation` of `jattn.attention`.

    Returns:
        The output, `…TND`, in the dtype of the converted inputs.

    Raises:
        ValueError: If an argument does not fit, naming it and what to do; and where a
            single query decodes with `modifier` or `and_mask` and nothing says where it
            stands.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    options = _placed(options, input_positions, query, key)
    reads_positions = and_mask is not None or options.get("modifier") is not None
    layer.check_step(WHERE, query, key, reads_positions, options)
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
    """The options, with the positions that the layer gave."""
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
