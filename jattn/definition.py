"""What attention is: for one query, in three steps; for many, by `vmap`.

    scores         scoreₛ = scale · q·kₛ
    softmax        weightₛ = exp(logitₛ) / (Σₛ exp(logitₛ) + exp(sink))
    weighted_sum   output = Σₛ weightₛ vₛ

Between the first two steps, each score becomes a logit, modifier(scoreₛ, b, n, t, s) +
biasₛ, and counts only where the mask allows it. Everything else in this library is a
faster way to get the same numbers. Its values and derivatives are tested against this
page.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jattn.arrays.checks import align
from jattn.arrays.positions import checked_positions, spread_positions
from jattn.arrays.shapes import flatten_batch, measure, unflatten_batch, wide_dtype
from jattn.dropout import keep, words
from jattn.masks import as_mask
from jattn.modifiers import as_modifier
from jattn.state import State

__all__ = [
    "Answer",
    "attend",
    "attention",
    "attention_state",
    "attention_weights",
    "logsumexp",
    "scores",
    "softmax",
    "weighted_sum",
]


def scores(query, key, scale=1.0):
    """Computes how well one query `H` fits each of the keys `SH`: scale · q·kₛ, `S`."""
    return scale * (key @ query)


def softmax(logits, sink=-jnp.inf):
    """Computes weights in proportion to exp(logit), `S` → `S`; they sum to 1.

    The largest logit is subtracted first, so that nothing overflows. The sink is one more
    logit in the sum; its weight goes to no key. Where every logit is −∞, all weights
    are 0.
    """
    top = jnp.max(logits, initial=-jnp.inf)
    top = jnp.maximum(top, jnp.where(sink == jnp.inf, top, sink))  # ∞ takes all weight
    # Any finite `top` gives the same weights, so no gradient flows through it.
    top = jax.lax.stop_gradient(jnp.where(jnp.isinf(top), 0, top))
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials) + jnp.exp(sink - top)
    return exponentials / jnp.where(total == 0, 1, total)


def logsumexp(logits):
    """Computes log Σₛ exp(logitₛ), a scalar; −∞ where every logit is −∞."""
    top = jnp.max(logits, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(jnp.exp(logits - top))
    return jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))


def weighted_sum(weights, value):
    """Sums the values `SD` with their weights `S`: Σₛ weightₛ vₛ, `D`."""
    return weights @ value


class Answer(NamedTuple):
    """The results of attention for one query."""

    output: jax.Array  # D
    weights: jax.Array  # S
    logsumexp: jax.Array


def attend(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=-jnp.inf,
    scale=None,
    dropout=None,
) -> Answer:
    """Attends from one query to a sequence of keys and values.

        output = Σₛ weightₛ vₛ        weights = softmax(modifier(scores) + bias)

    A key that the mask leaves out changes nothing, even if it is NaN. A query that sees no
    key has output zero, weights zero, logsumexp −∞ and every gradient zero.

    Args:
        query: The query, `H`.
        key: The keys, `SH`.
        value: The values, `SD`.
        mask: Which keys count, Booleans `S`; every key by default.
        bias: What is added to the logits, `S`.
        modifier: What turns the scores, `S`, into logits, `S`.
        sink: A logit that only takes weight away.
        scale: Multiplies the scores; 1/√H by default.
        dropout: What turns the weights, `S`, into the weights of the sum.

    Returns:
        The output `D`, the weights `S`, and the logsumexp of the logits, without the sink.

    Example:
        >>> attend(jnp.zeros(2), jnp.zeros((2, 2)), jnp.array([[0.0], [1.0]])).output
        Array([0.5], dtype=float32)

    Reference:
        Vaswani et al., 2017, arXiv:1706.03762, section 3.2.1, equation 1.
    """
    chex.assert_rank([query, key, value], [1, 2, 2])
    chex.assert_equal_shape_prefix([key, value], 1)
    wide = wide_dtype(query.dtype)
    query, key, dtype = query.astype(wide), key.astype(wide), value.dtype
    value = value.astype(wide)
    if mask is not None:
        # A weight of 0 times NaN is NaN, so masked keys and values become 0 as well.
        key = jnp.where(mask[:, None], key, 0)
        value = jnp.where(mask[:, None], value, 0)
    logits = scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    if modifier is not None:
        # Masked scores become 0.618, where most modifiers have a finite derivative: the
        # cotangent there is 0, and 0 times an infinite derivative would be NaN.
        logits = modifier(logits if mask is None else jnp.where(mask, logits, 0.618))
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    weights = softmax(logits, sink)
    # Where another logit is NaN, masked weights would be NaN too, and reach gradients.
    weights = weights if mask is None else jnp.where(mask, weights, 0)
    weights = weights if dropout is None else dropout(weights)
    return Answer(weighted_sum(weights, value).astype(dtype), weights, logsumexp(logits))


def attention(query, key, value, **options) -> jax.Array:
    """Computes `jattn.attention` by this definition: BTNH, BSKH, BSKD → BTND."""
    return attention_state(query, key, value, **options).output


def attention_state(query, key, value, **options) -> State:
    """Computes `jattn.attention_state` by this definition: `attend` of all queries."""
    answer = _attend_all(query, key, value, **options)
    output = jnp.swapaxes(answer.output, -3, -2)
    return State(output, jnp.swapaxes(answer.logsumexp, -2, -1))


def attention_weights(query, key, **options) -> jax.Array:
    """Computes `jattn.attention_weights` by this definition: BTNH, BSKH → BNTS."""
    return _attend_all(query, key, key, **options).weights


def _attend_all(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    sink=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
) -> Answer:
    """Maps `attend` over queries, heads and examples; each field has leading axes BNT."""
    where = "definition"
    sizes, wide = measure(where, query, key, value), wide_dtype(query.dtype)
    mask = None if mask is None else as_mask(mask, where)
    modifier = None if modifier is None else as_modifier(modifier, where)
    sink = jnp.full(sizes.N, -jnp.inf, wide) if sink is None else sink
    scale = None if scale is None else jnp.asarray(scale).astype(wide)
    t, s, _ = checked_positions(where, sizes, query_position, key_position)
    t, s = spread_positions(t, sizes.T), spread_positions(s, sizes.S)
    one = _of_one_query(sizes, mask, modifier, scale, dropout)
    over_queries = jax.vmap(one, (None, None, 0, None, 0, None, None, None, 0))
    over_heads = jax.vmap(over_queries, (None, 0, None, None, 1, None, None, 0, 0))
    over_examples = jax.vmap(over_heads, (0, None, 0, 0, 0, 0, 0, None, 0))
    answer = over_examples(
        jnp.arange(sizes.B, dtype=jnp.int32),
        jnp.arange(sizes.N, dtype=jnp.int32),
        jnp.broadcast_to(t, (sizes.B, sizes.T)),
        jnp.broadcast_to(s, (sizes.B, sizes.S)),
        flatten_batch(query, sizes),
        flatten_batch(key, sizes),
        flatten_batch(value, sizes),
        jnp.broadcast_to(sink, (sizes.N,)).astype(wide),
        _elements(where, sizes, wide, mask, modifier, bias),
    )
    return jax.tree.map(lambda x: unflatten_batch(x, sizes), answer)


def _elements(where, sizes, wide, mask, modifier, bias):
    """Gives what mask, modifier and bias read by row and column, BNTS in full."""
    arrays = (
        () if mask is None else mask.aligned(sizes),
        () if modifier is None else modifier.aligned(sizes),
        None if bias is None else align(where, "bias", bias, sizes).astype(wide),
    )
    return jax.tree.map(lambda x: jnp.broadcast_to(x, sizes.BNTS), arrays)


def _of_one_query(sizes, mask, modifier, scale, dropout):
    """Makes a function that attends from one query of one head of one example."""

    def one(b, n, t, s, query, key, value, sink, elements):
        mask_elements, modifier_elements, bias = elements
        allowed = modify = drop = None
        if mask is not None:
            allows = lambda s, e: mask.allows(b, n, t, s, e)
            allowed = jax.vmap(allows)(s, mask_elements)
        if modifier is not None:
            change = lambda x, s, e: jnp.asarray(modifier.modify(x, b, n, t, s, e), x.dtype)
            modify = lambda scores: jax.vmap(change)(scores, s, modifier_elements)
        if dropout is not None:
            drop = functools.partial(_drop, dropout, b, n, t, s)
        kv_head = n // sizes.G  # the query heads of one group share a key/value head
        return attend(
            query,
            key[:, kv_head],
            value[:, kv_head],
            mask=allowed,
            bias=bias,
            modifier=modify,
            sink=sink,
            scale=scale,
            dropout=drop,
        )

    return one


def _drop(dropout, b, n, t, s, weights):
    """Drops weights; those that are kept grow so that the sum is expected to stay."""
    # A shared draw does not depend on b and n: it is the draw of b = 0, n = 0.
    here = (0 * b, 0 * n) if dropout.shared else (b, n)
    sides = words(dropout.rng, *here, t, side=0), words(dropout.rng, *here, s, side=1)
    kept = keep(*sides, dropout.rate)
    return jnp.where(kept, weights / (1 - dropout.rate), 0)
