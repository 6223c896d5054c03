"""Output, maximum and sum, block by block, on NVIDIA GPUs.

Logits are queries × keys. For each block of keys

    top′    = max(top, maxₛ logitₛ)
    total′  = total · exp(top − top′) + Σₛ exp(logitₛ − top′)
    output′ = output · exp(top − top′) + Σₛ exp(logitₛ − top′) vₛ

Exponentials have the base 2, because the device has an instruction for it:
exp(x) = 2^(x · log₂ e). Without a modifier and a bias, the logits are the products
themselves, and the scale is part of that factor.

The maximum is subtracted before the multiplication by this factor, so that the difference
is exact: 0 at the maximum itself. Multiplied first, and fused with the subtraction of a
rounded product, it took an instruction less, but was wrong by as much as a product of 1e6
is rounded, 6 %; and the lowest finite number, which other libraries hide keys with, became
−∞ − (−∞).
"""

import jax.numpy as jnp

from jattn.implementations.gpu.call import Arguments, Call
from jattn.implementations.gpu.layout import ROWS
from jattn.implementations.gpu.machine import spread, store, zeros
from jattn.implementations.gpu.pairs import LOG2_E, plain
from jattn.implementations.gpu.program import Context
from jattn.implementations.gpu.tiles import Tile, own_vectors

_COUNT = 32  # log₂ of more keys than a call can have
_NEAR = 3  # places from a quotient to the product: a GPU divides with an error of 2


def forward(call: Call, arguments: Arguments):
    """Computes output B × T × N × D, maximum and sum B × N × T, in float32.

    `inputs` are queries, keys and values. The maximum is that of what the kernel has for
    logits, see `of_logits`.
    """
    query, _, value = arguments.inputs
    (_, T, N, _), D = query.shape, value.shape[3]
    results = [(T, N, D), (N, T), (N, T)]
    return call.run(_kernel, arguments, 1, results, "jattn_forward")


def of_logits(top, total, unit):
    """Gives the maximum of the logits, and the sum that belongs to it.

    What the kernel has for logits are products where nothing but the scale is between the
    two; `unit` is the size of the scale there, else 1. The scale rounds the maximum. So
    the sum is made that of another product, `base`, which backward computes from the
    maximum:
        total′ = total · exp((top − base) · unit)

    Two products at most have the same maximum, because a multiplication at most halves
    the relative distance of neighbours. Where total > 1, base is the smaller one, so that
    total′ > 1. Where total = 1, it is the larger one, so that total′ ≤ 1. So backward
    knows where one key has all the weight.
    """
    scaled, settled = top * unit, total == 1
    beside = jnp.nextafter(top, jnp.where(settled, jnp.inf, -jnp.inf).astype(top.dtype))
    base = jnp.where(beside * unit == scaled, beside, top)
    changed = total * jnp.exp2(_exponent(top, base, unit))
    # Neither side of 1 may be left because exp2 rounds.
    low, high = jnp.minimum(changed, 1), jnp.maximum(changed, total)
    return scaled, jnp.where(settled, low, high)


def base_of(top, total, unit):
    """Computes from what `of_logits` gives the product and log₂ of the sum that fits it.

    It is right however the compiler rounds a division: it tries products until one has
    the maximum.
    """
    direction = jnp.where(total <= 1, -1, 1).astype(top.dtype)
    wanted, base = direction * top, direction * (top / unit)
    up, down = (jnp.full_like(top, x) for x in (jnp.inf, -jnp.inf))
    for _ in range(_NEAR):
        base = jnp.nextafter(base, down)
    for _ in range(2 * _NEAR):
        base = jnp.where(base * unit < wanted, jnp.nextafter(base, up), base)
    level = jnp.log2(total)
    # No sum of weights is so large or so small. So the kernel's maximum is the neighbour.
    moved, beside = jnp.abs(level) > _COUNT, jnp.nextafter(base, up)
    base, beside = direction * base, direction * beside
    exponent = _exponent(beside, base, unit)
    return jnp.where(moved, beside, base), jnp.where(moved, level - exponent, level)


def _exponent(top, base, unit):
    """Computes the logarithm of a change of the sum; at 1e9 it could leave float32.

    It is then bounded, to more than any sum of weights can be. What is left out is less
    than the last place of the maximum.
    """
    change = jnp.where(jnp.isfinite(top), top - base, 0)
    return jnp.clip(change * unit * LOG2_E, -_COUNT - 8, _COUNT + 8)


def _kernel(context: Context):
    """Visits the blocks of keys; gives a function that writes the results."""
    call, given, keys = context.call, context.given, context.streams[0]
    exponent = given.numbers[1]
    own = own_vectors(call, given.extras, context.at, context.rows)
    start = (
        zeros((ROWS,)) - jnp.inf,
        zeros((ROWS,)),
        zeros((ROWS, context.streams[1].memory.shape[-1])),
    )

    def step(masked, j, carry):
        top, total, sums = carry
        slot, first = context.first(j)
        keys.wait(slot)
        products = call.machine.products(context.own[0], keys.memory.at[slot], context.turn)
        keys.release(slot)
        shape = products.shape
        where = context.rows.start, first
        tile = Tile(call, given.extras, own, context.at, where, shape)
        logits = _logits(tile, products, given.numbers[0], masked)
        now = jnp.maximum(top, jnp.max(logits, axis=1))
        safe = jnp.where(now == -jnp.inf, 0, now)  # −∞ − (−∞) would be NaN
        weights = jnp.exp2((logits - spread(safe, shape, 0)) * exponent)
        shrink = jnp.exp2((top - safe) * exponent)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums = _add_values(context, tile, slot, (sums, shrink, weights))
        return now, total, sums

    top, total, sums = context.in_turns(lambda: context.loop(step, start))
    return lambda outputs: _finish(context, (top, total, sums), outputs)


def _logits(tile: Tile, products, size, masked: bool):
    """Computes the logits from products; −∞ where a pair does not count."""
    logits = products
    if tile.call.has_logits:
        logits = plain(tile.logits, products * size, tile.active)
    if not masked:
        return logits
    return jnp.where(plain(tile.allowed), logits, -jnp.inf)


def _add_values(context: Context, tile: Tile, slot, state):
    """Adds the values of a block, each times its weight, to the output."""
    (sums, shrink, weights), values = state, context.streams[1]
    kept = tile.kept()
    weights = weights if kept is None else jnp.where(kept, weights, 0)
    sums = sums * spread(shrink, sums.shape, 0)
    context.turn()
    values.wait(slot)
    sums = context.call.machine.add(sums, weights, values.memory.at[slot])
    values.release(slot)
    return sums


def _finish(context: Context, state, outputs):
    """Divides by the sums, and writes the results."""
    (top, total, sums), (output, row_max, row_sum) = state, outputs
    (b, n), rows = context.at, context.rows
    empty = total == 0
    # Dropout's 1 / (1 − rate) is applied here, once for each row.
    rest = 1 - context.call.problem.rate
    share = 1 / (jnp.where(empty, 1, total) * rest)
    store(output.at[b, rows, n], sums * spread(share, sums.shape, 0))
    store(row_max.at[b, n, rows], jnp.where(empty, 0, top))
    store(row_sum.at[b, n, rows], total)
