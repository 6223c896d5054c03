"""`jattn.attention` in `flax.linen` layers, and the layer that decodes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, serialization
from flax.linen import dtypes

from jattn import caches
from jattn.adapters import layer, pairs
from jattn.arrays.checks import check_flag
from jattn.arrays.shapes import wide_dtype

__all__ = ["MultiHeadDotProductAttention", "attention"]

WHERE = "linen.attention"
WHERE_LAYER = "linen.MultiHeadDotProductAttention"


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
        dropout_rate: The probability that a weight is dropped, < 1; a known number.
        deterministic: Whether nothing is dropped.
        dtype: The dtype to convert the inputs to; by default the one they promote to.
        precision: The precision of products, the same for both sides of a product.
        module: If given, all T × S weights are sown in it as `attention_weights`.
        force_fp32_for_softmax: Whether sown weights keep the softmax's dtype, float32 at
            least; otherwise they have that of the inputs.
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
    is_wide = check_flag(WHERE, "force_fp32_for_softmax", force_fp32_for_softmax)
    _refuse_products(einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
    query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
    layer.check_step(WHERE, query, key, and_mask, options)
    drawn = dropout_rate, dropout_rng, deterministic, broadcast_dropout
    sow = lambda weights: module.sow("intermediates", "attention_weights", weights)
    return layer.attend(
        WHERE,
        query,
        key,
        value,
        bias=bias,
        mask=pairs.joined(WHERE, (mask, and_mask), query, key),
        dropout=layer.dropout(WHERE, *drawn),
        precision=precision,
        sow=None if module is None else sow,
        sown_dtype=wide_dtype(query.dtype) if is_wide else None,
        options=options,
    )


def _arrays_of(kv: caches.Cache) -> dict[str, jax.Array]:
    """Gives the arrays of a cache by name, for flax's serialization."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(kv)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _with_arrays(kv: caches.Cache, arrays: dict[str, Any]) -> caches.Cache:
    """Gives a cache like another one, with the arrays of `_arrays_of`."""
    return jax.tree.unflatten(
        jax.tree.structure(kv), [arrays[name] for name in _arrays_of(kv)]
    )


serialization.register_serialization_state(
    caches.Cache, _arrays_of, _with_arrays, override=True
)


def _refuse_products(*products) -> None:
    """Raises if one of the caller's products is given."""
    names = "einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"
    for name, product in zip(names, products, strict=True):
        if product is not None:
            raise ValueError(
                f"{WHERE}: `{name}` must be None, for jattn takes its products itself; "
                f"leave it out, or keep `nn.dot_product_attention` in this layer."
            )


class MultiHeadDotProductAttention(linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention`, parameter for parameter, that decodes.

    Without `decode` it is flax's layer with this library's attention inside. With
    `decode=True` it keeps a cache of `jattn.caches` as the variable `kv` of the collection
    "cache". As in flax, `init` makes it, for as many tokens as its input has:

        layer = MultiHeadDotProductAttention(4, decode=True)
        variables = layer.init(rng, jnp.ones((B, capacity, features)))
        y, changed = layer.apply(variables, x, mutable="cache")

    The differences from flax (0.12) in decoding are:

    - A call may bring several tokens, a whole prompt too. Each sees itself and those before
      it.
    - More tokens than fit give NaN, or a ValueError where the numbers are known; in flax
      they overwrite the last one.
    - A step takes the time of what is filled. The cache may be of 8 or 4 bits.
    - Nothing is dropped, and no weights are sown.

    Attributes:
        attention_fn: What attends without `decode`. Decoding takes over what
            `functools.partial` adds to this module's `attention`, but no positions.
        cache_dtype: See `jattn.caches.empty`; the dtype of the keys by default.
    """

    attention_fn: Callable[..., Any] = attention
    cache_dtype: Any = None

    @linen.compact
    def __call__(
        self, inputs_q, inputs_k=None, inputs_v=None, *, mask=None, count=None, **options
    ) -> jax.Array:
        """Projects, attends and projects back.

        Args:
            inputs_q: `…T` × features.
            inputs_k: `…S` × features; the queries by default, and always in decoding.
            inputs_v: `…S` × features; the keys by default.
            mask: As in `attention`. In decoding a further mask besides the causal one, of
                positions from the first token on; an array has `capacity` columns.
            count: In decoding, how many of the T tokens count; all by default.
            **options: See flax.

        Returns:
            `…T` × out_features.

        Raises:
            ValueError: If an argument does not fit; the message says what to do.
        """
        decodes = layer.flag(WHERE_LAYER, "decode", self.decode)
        others = inputs_k, inputs_v, options.get("inputs_kv")
        if decodes and any(x is not None for x in others):
            raise ValueError(
                f"{WHERE_LAYER}: in decoding, queries, keys and values must be of the same "
                f"tokens, got `inputs_k` or `inputs_v`; give `inputs_q` alone."
            )

        if not decodes:
            layer.check_count(WHERE_LAYER, count)

        def extend(query, key, value, mask=None, precision=None, module=None):
            del module  # given where weights are to be sown
            return self._extend(query, key, value, mask, count, precision)

        inner: Any = self._inner(extend if decodes else self.attention_fn)
        linen.share_scope(self, inner)  # so its parameters are this layer's own
        return inner(inputs_q, inputs_k, inputs_v, mask=mask, **options)

    def _inner(self, attend: Callable[..., Any]) -> linen.MultiHeadDotProductAttention:
        """Makes flax's layer with the settings of this one, which never decodes itself."""
        kind = linen.MultiHeadDotProductAttention
        own = {"parent", "name", "attention_fn", "decode"}
        names = {field.name for field in dataclasses.fields(kind) if field.init} - own
        settings = {name: getattr(self, name) for name in names}
        if self.decode:
            settings["dropout_rate"] = 0.0
        return kind(**settings, attention_fn=attend)

    def _extend(self, query, key, value, mask, count, precision) -> jax.Array:
        is_there = self.has_variable("cache", "kv")
        dtype = key.dtype if self.cache_dtype is None else self.cache_dtype
        *batch, T, K, H = key.shape
        kv = self.variable(
            "cache", "kv", lambda: caches.empty(tuple(batch), T, K, H, dtype=dtype)
        )
        mask, added = layer.decoding(WHERE_LAYER, self.attention_fn, attention, mask)
        given = {"mask": mask, "count": count, "precision": precision, "options": added}
        output, after = layer.extend(WHERE_LAYER, kv.value, query, key, value, **given)
        if is_there:  # what initialises a model only makes the cache
            kv.value = after
        return output
