"""`jattn.attention` as the `attention_fn` of `flax.linen` layers."""

from typing import Any

import jax
from flax.linen import dtypes

from jattn.adapters import layer

__all__ = ["attention"]

WHERE = "linen.attention"


# A linen layer passes only those arguments whose names are in this signature.
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
    force_fp32_for_softmax=False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    *,
    and_mask=None,
    **options,
) -> jax.Array:
    """Attends like `flax.linen.dot_product_attention`, for `attention_fn=` of a layer.

        nn.MultiHeadDotProductAttention(…, attention_fn=jattn.adapters.linen.attention)

    The layer keeps its parameters, outputs and gradients. `functools.partial` adds options
    that flax lacks: `partial(attention, modifier=ALiBi(), and_mask=Causal())`.

    The differences from flax (0.12) are:

    - A query that sees no key has output 0 and gradient 0. In flax the output is the mean
      of the values.
    - The softmax is in float32 at least, with or without `force_fp32_for_softmax`.
    - Dropout has the same probability, but drops other weights. With `broadcast_dropout` it
      drops the same weights in all examples and heads, as in flax.
    - There may be fewer key/value heads than query heads.

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
        force_fp32_for_softmax: Ignored: the softmax is always in float32 at least.
        einsum_dot_general: Refused, since jattn computes its products itself.
        qk_attn_weights_einsum: Refused for the same reason.
        attn_weights_value_einsum: Refused for the same reason.
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
    del force_fp32_for_softmax
    products = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, product in products.items():
        if product is not None:
            raise ValueError(
                f"{WHERE}: `{name}` must be None, for jattn takes its products itself; "
                f"leave it out, or keep `nn.dot_product_attention` in this layer."
            )
    query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
    reads_positions = and_mask is not None or options.get("modifier") is not None
    layer.check_step(WHERE, query, key, reads_positions, options)
    sow = lambda weights: module.sow("intermediates", "attention_weights", weights)
    return layer.attend(
        WHERE,
        query,
        key,
        value,
        bias=bias,
        mask=layer.both(layer.any_mask(WHERE, mask), layer.any_mask(WHERE, and_mask)),
        dropout=layer.dropout(
            WHERE, dropout_rate, dropout_rng, deterministic, broadcast_dropout
        ),
        precision=precision,
        sow=None if module is None else sow,
        options=options,
    )
