"""Output, maximum and sum, block by block, on TPU.

Logits are keys × columns, so the running maximum and sum of all queries are one row. For
each part of a block

    top′    = max(top, maxₛ logitₛ)
    total′  = total · exp(top − top′) + Σₛ exp(logitₛ − top′)
    output′ = output · exp(top − top′) + Σₛ exp(logitₛ − top′) vₛ

The product of the next part starts before the softmax of the current part, so that the
matrix unit is busy meanwhile. Exponentials have the base 2, because the machine has an
instruction for it: exp(x) = 2^(x · log₂ e).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattn.implementations.tpu import schedule as steps
from jattn.implementations.tpu.call import Arguments, Call
from jattn.implementations.tpu.tiles import Tile, parts

_VMEM = 48 * 2**20  # bytes; forward keeps blocks only, and no array of a whole head


def forward(call: Call, arguments: Arguments):
    """Computes output B × heads × D × columns, maximum and sum B × heads × 1 × columns.

    `inputs` are queries, transposed; keys; and values, transposed: B × K × D × S.
    """
    call = call.of(arguments)
    (H, D), columns = (call.problem.sizes.H, call.problem.sizes.D), call.plan.columns
    length = columns * call.plan.queries
    tree = jax.tree.structure(arguments.extras)
    return call.run(
        functools.partial(_kernel, call, tree),
        arguments,
        (
            call.query_spec(H),
            call.key_spec(H),
            call.key_spec(D, transposed=True),
            call.extra_specs(arguments.extras),
        ),
        name="jattn_forward",
        out_specs=(call.query_spec(D), call.query_spec(1), call.query_spec(1)),
        out_shape=[call.result((size, length)) for size in (D, 1, 1)],
        scratch_shapes=[pltpu.VMEM((size, columns), jnp.float32) for size in (1, 1, D)],
        semantics=("parallel", "parallel", "arbitrary"),
        vmem=_VMEM,
    )


def _kernel(call: Call, tree, words, numbers, query, key, value, *rest):
    """Adds one block to the sums; the first of a row clears them, the last divides."""
    refs = jax.tree.unflatten(tree, rest[: tree.num_leaves])
    output, row_max, row_sum, *state = rest[tree.num_leaves :]
    top, total, sums = state
    word = call.word(words)

    @pl.when(word & steps.FIRST != 0)
    def _start():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def block(masked, half=None):
        _, j = steps.blocks(word)
        inputs = (query, key, value, refs, numbers[0], numbers[1])
        _forward_block(call, inputs, state, (j, half), masked)

    call.over_kinds(word, block)

    @pl.when(word & steps.LAST != 0)
    def _finish():
        empty = total[...] == 0
        safe = jnp.where(empty, 1, total[...])
        # Dropout's 1 / (1 − rate) is applied here, once for each row.
        share = 1 / (safe * (1 - call.problem.rate))
        output[0, 0] = sums[...] * share
        row_max[0, 0] = jnp.where(empty, 0, top[...] * numbers[2])
        row_sum[0, 0] = total[...]


def _forward_block(call: Call, inputs, state, at, masked: bool):
    """Adds one block of keys, or half of it, to the running maximum, sum and output."""
    j, half = at
    query, key, value, refs, size, exponent = inputs
    top, total, sums = state
    dot = lambda x, y: lax.dot_general(
        x,
        y,
        (((1,), (0,)), ((), ())),
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )
    products = lambda part: dot(key[0, 0, part.keys, :], query[0, 0, :, part.columns])
    todo = parts(call.plan, *call.tuning, half)
    coming = products(todo[0])
    for part, following in zip(todo, [*todo[1:], None], strict=True):
        logits = coming
        if following is not None:
            coming = products(following)
        tile = Tile(call, call.pairs, refs, j, part)
        if call.pairs.modifier is not None or refs.bias is not None:
            logits = tile.logits(logits * size, tile.active)
        allowed = tile.allowed(call.has_padding) if masked else None
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        at = (slice(None), part.columns)
        before = top[at]
        now = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
        safe = jnp.where(now == -jnp.inf, 0, now)  # −∞ − (−∞) would be NaN
        weights = jnp.exp2((logits - safe) * exponent)
        shrink = jnp.exp2((before - safe) * exponent)
        top[at] = now
        total[at] = total[at] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        kept = tile.kept()
        weights = weights if kept is None else jnp.where(kept, weights, 0)
        weights = weights.astype(value.dtype)
        sums[at] = sums[at] * shrink + dot(value[0, 0, :, part.keys], weights)
