"""`jattn.attention` in `flax.nnx.MultiHeadAttention`, and the layer that decodes."""

import inspect
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from jattn import caches
from jattn.adapters import layer, pairs

__all__ = ["MultiHeadAttention", "attention"]

WHERE = "nnx.attention"
WHERE_LAYER = "nnx.MultiHeadAttention"


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
        dropout_rate: The probability that a weight is dropped, < 1; a known number.
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
    options = layer.placed(WHERE, options, input_positions, query, key)
    layer.check_step(WHERE, query, key, and_mask, options)
    # In decoding the mask already says which keys of the cache are filled.
    decodes = query.shape[-3] == 1 < key.shape[-3] and mask is not None
    causal = pairs.causal(WHERE, is_causal, options)
    drawn = dropout_rate, dropout_rng, deterministic, broadcast_dropout
    sow = lambda weights: module.sow(nnx.Intermediate, "attention_weights", weights)
    return layer.attend(
        WHERE,
        query,
        key,
        value,
        bias=bias,
        mask=pairs.joined(WHERE, (None if decodes else causal, mask, and_mask), query, key),
        dropout=layer.dropout(WHERE, *drawn),
        precision=precision,
        sow=None if module is None else sow,
        options=options,
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention`, parameter for parameter, that decodes any prompt.

    Without `decode` it is flax's layer with this library's attention inside. With it, it
    keeps a cache of `jattn.caches`, as the variable `kv` of type `nnx.Cache`:

        layer.init_cache((B, capacity, features))
        y = layer(x, decode=True)

    The differences from flax (0.12) in decoding are:

    - A call may bring several tokens, a whole prompt too. Each sees itself and those before
      it, with or without `is_causal`.
    - More tokens than fit give NaN, or a ValueError where the numbers are known; in flax
      they overwrite the last one.
    - A step takes the time of what is filled. The cache may be of 8 or 4 bits.
    - Nothing is dropped, and no weights are sown.
    """

    def __init__(self, *sizes, attention_fn=attention, **options):
        """Makes the parameters of `flax.nnx.MultiHeadAttention`.

        Args:
            *sizes: As in flax, like all other arguments.
            attention_fn: What attends without `decode`. Decoding takes over what
                `functools.partial` adds to this module's `attention`, but no positions.
            **options: See flax.
        """
        super().__init__(*sizes, attention_fn=attention_fn, **options)
        self.kv: Any = nnx.data(None)

    def init_cache(self, input_shape, dtype="float32", *, ragged=False) -> None:
        """Makes a cache without tokens, or forgets those of the one that is there.

        Args:
            input_shape: `…` × capacity × features, as in flax.
            dtype: See `jattn.caches.empty`.
            ragged: Whether each example has a length of its own.
        """
        if len(input_shape) < 2:
            raise ValueError(
                f"{WHERE_LAYER}.init_cache: `input_shape` must be (…, capacity, "
                f"features), got {tuple(input_shape)}."
            )
        *batch, capacity, _ = input_shape
        sizes = tuple(batch), capacity, self.num_kv_heads, self.head_dim
        self.kv = nnx.Cache(caches.empty(*sizes, dtype=dtype, ragged=ragged))

    def __call__(
        self,
        inputs_q,
        inputs_k=None,
        inputs_v=None,
        *,
        mask=None,
        decode=None,
        count=None,
        **options,
    ) -> jax.Array:
        """Projects, attends and projects back.

        Args:
            inputs_q: `…T` × features.
            inputs_k: `…S` × features; the queries by default, and always in decoding.
            inputs_v: `…S` × features; the keys by default.
            mask: As in `attention`. In decoding a further mask besides the causal one, of
                positions from the first token on; an array has `capacity` columns.
            decode: Whether to append to the cache and attend to it; by default the
                setting of the layer.
            count: In decoding, how many of the T tokens count; see `caches.Cache.append`.
            **options: See flax; those of its dropout, weights and `is_causal` do nothing in
                decoding.

        Returns:
            `…T` × out_features.

        Raises:
            ValueError: If an argument does not fit; the message says what to do.
        """
        if not layer.flag(WHERE_LAYER, "decode", decode, self.decode):
            layer.check_count(WHERE_LAYER, count)
            given: Any = {"mask": mask, "decode": decode, **options}
            return super().__call__(inputs_q, inputs_k, inputs_v, **given)
        others = [x for x in (inputs_k, inputs_v) if x is not None and x is not inputs_q]
        if self.kv is None or others:
            raise ValueError(
                f"{WHERE_LAYER}: decoding needs a cache, and queries, keys and values of "
                f"the same tokens, got kv={type(self.kv).__name__} and {len(others)} other "
                f"inputs; call `init_cache` first, and give `inputs_q` alone."
            )
        self._check(inputs_q, options)
        return self._extend(inputs_q, mask, count, options)

    def _check(self, x, options) -> None:
        """Raises for what decoding cannot do, and as Python does for an unknown name."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{WHERE_LAYER}: `inputs_q` must be …T × {self.in_features}, got {x.shape}."
            )
        known = inspect.signature(super().__call__).parameters
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(
                f"{WHERE_LAYER}() got an unexpected keyword argument {unknown[0]!r}"
            )
        if options.get("input_positions") is not None:
            raise ValueError(
                f"{WHERE_LAYER}: `input_positions` must be left out in decoding, where the "
                f"cache counts its tokens from 0; use `jattn.caches` for other positions."
            )

    def _extend(self, x, mask, count, options) -> jax.Array:
        sharding = options.get("qkv_sharding")
        project = (self.query, self.key, self.value)
        query, key, value = (part(x, out_sharding=sharding) for part in project)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        mask, added = layer.decoding(WHERE_LAYER, self.attention_fn, attention, mask)
        given: Any = {"mask": mask, "count": count, "options": added}
        given["precision"] = self.precision
        kv = self.kv.get_value()
        output, after = layer.extend(WHERE_LAYER, kv, query, key, value, **given)
        self.kv.set_value(after)
        return self.out(output, out_sharding=options.get("out_sharding"))
