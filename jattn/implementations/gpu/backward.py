"""Cotangents, block by block, on NVIDIA GPUs: one kernel for queries, one or two for keys.

    d_logitₛ = weightₛ (vₛ · d_output − (δ − d_logsumexp))        δ = output · d_output
    d_q = Σₛ d_logitₛ kₛ        d_kₛ = Σ d_logitₛ q        d_vₛ = Σ weightₛ d_output

In the kernel for queries a tile is queries × keys, in those for keys it is keys × queries.
So the rows of a tile always belong to the sums, which stay in registers, and no two
programs add to the same number. The price is that products and weights are computed in
each kernel. Where the registers have no room for d_k beside d_v, each has its own kernel.

Four numbers of each query come from `row_numbers`:

    weightₛ = 2^((logitₛ − top) · log₂ e − level)
    d_logitₛ = weightₛ (share · vₛ · d_output − rest)

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 4.
"""

import functools

import jax
import jax.numpy as jnp

from jattn.call.problem import Problem
from jattn.implementations.gpu.call import Arguments, Call
from jattn.implementations.gpu.forward import base_of
from jattn.implementations.gpu.layout import ROWS, form
from jattn.implementations.gpu.machine import spread, store, vector, zeros
from jattn.implementations.gpu.pairs import plain
from jattn.implementations.gpu.program import Context
from jattn.implementations.gpu.tiles import Tile, own_vectors
from jattn.implementations.joint import Extras
from jattn.implementations.shared import harmless, inner


def row_numbers(problem: Problem, unit, outputs, cotangents, largest_value):
    """Computes top, level, share and rest of each row.

        top   = maxₛ logitₛ                  of what the kernel has for logits
        level = log₂ Σₛ exp(logitₛ − top)    +∞ where a row sees nothing: weights are 0;
                                             with a mask NaN if d_output is not finite
        share = 1 / (1 − rate)               0 where one key has all the weight
        rest  = δ − d_logsumexp              −d_logsumexp there

    Top and level stay apart: added up, they would be rounded by as much as top is. Where
    one key has all the weight, vₛ · d_output − δ is what a weight of 2⁻²⁴ for the others
    makes of their values. The two are rounded separately, so they are left out, unless
    the value of that key is so much smaller than the largest one that more would be lost
    than a rounding of bfloat16, 2⁻⁸ · Σ |output · d_output|.
    """
    output, top, total = outputs
    d_output, _, d_total = cotangents
    empty = total == 0
    sizes = jnp.abs(output), jnp.abs(d_output)
    lost = 2.0**-24 * largest_value.astype(total.dtype) * jnp.sum(sizes[1], axis=-1)
    settled = (total <= 1) & (lost <= 2.0**-8 * inner(*sizes))  # see `of_logits`
    settled &= ~empty
    top, level = base_of(top, jnp.where(empty, 1, total), unit)
    if problem.mask is not None:  # the kernels read a d_output that is finite, see `finite`
        finite = jnp.all(jnp.isfinite(d_output), axis=-1)
        level = jnp.where(finite, level, jnp.nan)
    level = jnp.where(empty, jnp.inf, level)
    share = jnp.where(settled, 0, jnp.full_like(total, 1 / (1 - problem.rate)))
    delta = jnp.where(settled, 0, inner(d_output, output))
    return top, level, share, delta - d_total * total


def backward(call: Call, sums: tuple[str, ...], wanted: Extras, arguments: Arguments):
    """Computes some of the cotangents, each with N heads, in float32.

    Args:
        call: The call.
        sums: Which sums a tile adds to: `("query",)`; or `("key", "value")` or one of them.
        wanted: Which extras need a cotangent. Those that belong to the rows of tiles are
            computed, each as B × N × rows.
        arguments: The `inputs` are queries, d_output, keys and values; or keys, values,
            queries and d_output, without the values for `("value",)`.
    """
    inputs = arguments.inputs
    length, N = inputs[0].shape[1], call.problem.sizes.N
    sizes = {"query": inputs[0], "key": inputs[0], "value": inputs[-1]}
    results = [(length, N, sizes[name].shape[3]) for name in sums]
    chosen = _chosen(call, wanted) if sums != ("value",) else []
    results += [(N, length)] * sum(chosen)

    def kernel(context):
        return _kernel(context, sums, chosen)

    return call.run(kernel, arguments, len(inputs) - 2, results, "jattn_backward")


def _chosen(call: Call, wanted: Extras) -> list[bool]:
    """Says which arrays of modifier and bias get their cotangent in this kernel."""
    forms = ("row", "number") if call.by_query else ("column",)
    active = lambda tree: (tree.modifier, tree.bias)
    leaves = zip(*(jax.tree.leaves(active(x)) for x in (call.shapes, wanted)), strict=True)
    return [flag and form(like) in forms for like, flag in leaves]


def _kernel(context: Context, sums, chosen):
    """Visits the blocks of the other side; gives a function that writes the sums."""
    call, given = context.call, context.given
    own = own_vectors(call, given.extras, context.at, context.rows)
    numbers = Numbers(context)
    first, last = context.own[0], context.streams[-1].memory
    like = {"query": first, "key": first, "value": last}
    start = tuple(zeros((ROWS, like[x].shape[-1])) for x in sums)
    start += (zeros((ROWS,)),) * sum(chosen)

    def step(masked, j, carry):
        slot, first = context.first(j)
        inner, outer = context.streams
        inner.wait(slot)
        products = call.machine.products(context.own[0], inner.memory.at[slot])
        shape, where = products.shape, (context.rows.start, first)
        tile = Tile(call, given.extras, own, context.at, where, shape)
        read = functools.partial(numbers.read, tile)
        shown = masked, chosen, given
        weights, pull = _weights(tile, products, read("top"), read("level"), shown)
        outer.wait(slot)
        carry = list(carry)
        if "value" in sums:
            place = sums.index("value")
            dropped = _keep(tile.kept(), weights)
            carry[place] = _add(context, carry[place], dropped, outer, slot)
        if sums == ("value",):
            outer.release(slot)
        else:
            _add_logits(context, tile, (weights, pull, read), carry, (len(sums), slot))
        inner.release(slot)
        return tuple(carry)

    found = context.loop(step, start)
    return lambda outputs: _finish(context, len(sums), found, outputs)


def _add_logits(context: Context, tile: Tile, state, carry: list, at):
    """Computes the cotangents of the logits, and adds what they give to the sums."""
    (weights, pull, read), (count, slot) = state, at
    inner, outer = context.streams
    machine = context.call.machine
    d_weights = machine.products(context.own[1], outer.memory.at[slot])
    outer.release(slot)
    d_logits = _keep(tile.kept(), d_weights) * read("share") - read("rest")
    d_logits, d_chosen = pull(weights * d_logits)
    carry[0] = _add(context, carry[0], d_logits, inner, slot)
    for place, x in enumerate(d_chosen, count):
        carry[place] += jnp.sum(x.astype(jnp.float32), axis=1)


class Numbers:
    """Top, level, share and rest of each query, as tiles.

    They are read once where the rows of tiles are queries. In the kernels for keys they are
    read for each tile, each when it is needed, because each of them takes 16 registers.
    """

    def __init__(self, context: Context):
        b, n = context.at
        names = ("top", "level", "share", "rest")
        self.by_query = context.call.by_query
        self.refs = dict(
            zip(names, (x.at[b, n] for x in context.given.vectors), strict=True)
        )
        if self.by_query:
            self.own = {k: vector(x.at[context.rows], 0) for k, x in self.refs.items()}

    def read(self, tile: Tile, name: str):
        """Gives one of them, spread to a tile."""
        if self.by_query:
            return spread(self.own[name], tile.shape, 0)
        return spread(vector(self.refs[name].at[tile.where[1]], 1), tile.shape, 1)


def _keep(kept, array):
    return array if kept is None else jnp.where(kept, array, 0)


def _add(context: Context, sums, factors, stream, slot):
    """Adds the block of a stream, each of its rows times a factor."""
    return context.call.machine.add(sums, factors, stream.memory.at[slot])


def _weights(tile: Tile, products, top, level, options):
    """Computes the weights, and a function from their logits' cotangents to the products'.

    The function gives also the cotangents of the chosen arrays.
    """
    (masked, chosen, given), call = options, tile.call
    size, exponent = given.numbers[0], given.numbers[1]
    allowed = plain(tile.allowed) if masked else None
    hide = lambda x: x if allowed is None else jnp.where(allowed, x, 0)
    logits, pull = products, lambda d: (hide(d), ())
    if call.has_logits:
        scaled = harmless(products * size, allowed)
        logits = plain(tile.logits, scaled, tile.active)
        pull = lambda d: _pull(tile, scaled, chosen, allowed, d)
    # The level of a row may be NaN, so that weights are hidden, and not only logits.
    return hide(jnp.exp2((logits - top) * exponent - level)), pull


def _pull(tile: Tile, scaled, chosen, allowed, d_logits):
    """Pulls cotangents of the logits back to the products and to the chosen arrays."""
    leaves, tree = jax.tree.flatten(tile.active)
    picked = [x for x, flag in zip(leaves, chosen, strict=True) if flag]

    def logits(products, picked):
        some = iter(picked)
        pairs = zip(leaves, chosen, strict=True)
        filled = [next(some) if flag else x for x, flag in pairs]
        return tile.logits(products, tree.unflatten(filled))

    back = lambda x, y, d: jax.vjp(logits, x, y)[1](d)
    d_products, d_picked = plain(back, scaled, picked, d_logits)
    if allowed is not None:  # the derivative may be infinite where a pair is hidden
        d_products = jnp.where(allowed, d_products, 0)
        d_picked = [jnp.where(allowed, x, 0) for x in d_picked]
    return d_products, d_picked


def _finish(context: Context, count: int, found, outputs):
    """Writes the sums, and the cotangents of the arrays that rows read."""
    (b, n), rows = context.at, context.rows
    for ref, value in zip(outputs[:count], found[:count], strict=True):
        store(ref.at[b, rows, n], value)
    for ref, value in zip(outputs[count:], found[count:], strict=True):
        store(ref.at[b, n, rows], value)
