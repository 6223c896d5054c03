"""A few queries by the slots that count: in the time that these take.

    at most FIRST slots count          these alone, cut from the source
    at most half of them               a loop over chunks, each cut from the source
    more                               all slots at once, where they lie

To cut is to copy, which takes as long as to attend: so beyond a half it is faster to look
at every slot, and nothing is ever copied but a chunk. Vectors that have to be widened,
those that are rounded, always go by chunks, or XLA would widen all of them.

Each part is exact for every mask, modifier, bias and dropout: its logits are made as in any
tile, and parts add up as blocks do everywhere in the library, by a running maximum:

    top ← max(top, max logit)      total ← total · e^(old top − top) + Σ e^(logit − top)
                                   output ← likewise, with the values
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem, index
from jattn.dropout import keep
from jattn.implementations import bounded, shared
from jattn.implementations.source import Source, cut, longer, scaled_products
from jattn.operations.mapped import cond_any

# How many slots the shortest part has. One of 128 takes 0.1 ms, mostly of starting threads;
# one of 256 a third longer.
FIRST = 128
# How many slots a chunk has. With 512 a chunk of a cache of 8192 slots is 6 % of it; with
# 128 what a step of the loop costs shows.
CHUNK = 256
# How many slots a chunk has that is widened, in a long cache of few heads in all. With 8
# heads of 64 these are 2 MB of keys in float32. So int8 of 65536 slots takes 6.0 ms, and
# 8.2 in chunks of 256; with 64 heads, 16 MB, it would take 20 and 9.4 (Zen 5).
LONG, WIDE_HEADS = 1024, 8
# How many logits a chunk may have: 8 MB of float32.
LOGITS = 2**21


def attend(problem: Problem, operands: Operands, source: Source, end, order=None):
    """Gives the output BTND, and the maximum and the sum BTN.

    Args:
        problem: The call.
        operands: Its arrays, without keys and values; the words of dropout are drawn.
        source: Where keys and values are.
        end: How many slots count, from the first one on, as an int32.
        order: The numbers of the chunks in the order of their visits, where that is not
            the order of the slots. Those that count come first, and have `end` slots.
    """
    run = functools.partial(_parts, problem, operands, end=end, order=order)
    sums = run(source, isolating=False)
    if problem.mask is None and not source.mixes:
        return _finished(problem, sums)
    # A NaN in a value that no query sees spoils a product all the same: 0 · NaN is NaN.
    spoiled = ~jnp.all(jnp.isfinite(sums.output))
    mend = lambda _: run(source.apart(), isolating=True)
    sums = cond_any(spoiled, mend, lambda x: x, sums)
    return _finished(problem, sums)


def mended(problem: Problem, operands: Operands, source: Source, end):
    """Gives what `attend` gives where it finds a NaN in a value that no query sees.

    Not on CPU: what guards a loop there makes XLA copy all slots on TPU.
    """
    run = functools.partial(_parts, problem, operands, source.apart(), isolating=True)
    return _finished(problem, run(end=end, order=None, guarded=False))


def chunk_of(problem: Problem, source: Source) -> int:
    """Gives how many slots a chunk has."""
    B, N, T, _ = problem.sizes.BNTS
    if not problem.sizes.are_known:  # in an export
        return _fit(CHUNK, source)
    is_long = source.slots >= 16 * LONG and B * problem.sizes.K <= WIDE_HEADS
    size = LONG if is_long and not source.lies_ready(problem.wide) else CHUNK
    return _fit(min(size, max(LOGITS // (B * N * T), 64)), source)


def takes_all(source: Source, wide, end):
    """Says whether all slots are multiplied at once, if so many count."""
    return source.lies_ready(wide) and end > source.slots // 2


class _Sums(NamedTuple):
    """What a running maximum has seen: BNT, BNT and BKRD."""

    top: jax.Array
    total: jax.Array
    output: jax.Array


def _parts(
    problem, operands, source: Source, *, end, order, isolating, guarded=True
) -> _Sums:
    step = functools.partial(_step, problem, operands, source, isolating)
    slots, start = source.slots, _nothing(problem)
    # What isolates copies what it reads.
    in_place = source.lies_ready(problem.wide) and not isolating
    short, chunk = _fit(FIRST, source), chunk_of(problem, source)
    if isolating and order is None:
        chunk = _fit(chunk // 2, source)  # to isolate takes twice the memory

    def loop(_):
        place = lambda i: i if order is None else order[i]
        count = jnp.minimum((end + chunk - 1) // chunk, -(-slots // chunk))
        body = lambda sums, i: step(sums, place(i) * chunk, chunk)
        turn = _guarded(body, problem, count) if guarded else body
        return lax.fori_loop(0, count, lambda i, sums: turn(sums, i), start)

    whole = lambda _: step(None, 0, slots)
    if slots <= short:
        return whole(())
    many = jnp.asarray(takes_all(source, problem.wide, end))
    if order is not None:
        return lax.cond(many, whole, loop, ()) if in_place else loop(())
    first = lambda _: step(None, 0, short)
    if in_place:
        case = (end > short).astype(jnp.int32) + many.astype(jnp.int32)
        return lax.switch(case, [first, loop, whole], ())
    return lax.cond(end <= short, first, loop, ())


def _guarded(body, problem: Problem, count):
    """Gives the body of the loop; within a condition that holds, for narrow vectors.

    XLA:CPU (jax 0.10) widens bfloat16 before it is cut, and would do so with all slots
    before the loop. What is in a branch stays there, where only the chunk is widened.
    """
    if problem.dtype == problem.wide:
        return body
    return lambda sums, i: lax.cond(i < count, body, lambda sums, i: sums, sums, i)


def _fit(size: int, source: Source) -> int:
    """Gives the next multiple of the source's unit, and no more than all slots."""
    return min(-(-size // source.unit) * source.unit, source.slots)


def _nothing(problem: Problem) -> _Sums:
    B, N, T, _ = problem.sizes.BNTS
    K, G, D = problem.sizes.K, problem.sizes.G, problem.sizes.D
    zeros = jnp.zeros((B, N, T), problem.wide)
    output = jnp.zeros((B, K, G * T, D), problem.wide)
    return _Sums(zeros + jnp.finfo(problem.wide).min, zeros, output)


def _finished(problem: Problem, sums: _Sums):
    """Gives output BTND, and maximum and sum BTN, of all parts."""
    B, N, T, _ = problem.sizes.BNTS
    total = jnp.where(sums.total == 0, 1, sums.total)
    output = sums.output.reshape(B, N, T, -1) / total[..., None]
    top = jnp.where(sums.total == 0, 0, sums.top)
    return tuple(jnp.swapaxes(x, 1, 2) for x in (output, top, sums.total))


def _step(problem, operands, source: Source, isolating, sums, first, size: int):
    """Adds the slots from `first` on; those before it were added already, or are dead.

    Without `sums` there were none before, and no maximum of before comes in.
    """
    start = first if size == source.slots else jnp.minimum(first, source.slots - size)
    call, of_part = cut(problem, operands, start, size)
    is_whole = size == source.slots and not isolating
    part = source.whole() if is_whole else source.cut(start, size)
    if sums is None and not isolating and bounded.pays(call, of_part):
        return _Sums(*bounded.sums(call, of_part, part))
    logits, allowed = _logits(call, of_part, part)
    if size < source.slots:  # the last chunk may begin before its place, to fit
        fresh = start + jnp.arange(size, dtype=jnp.int32)[None, None, None] >= first
        allowed = fresh if allowed is None else allowed & fresh
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    # A finite bound: in an empty row −∞ − top is −∞, not NaN, and every weight is 0.
    top = jnp.max(logits, axis=-1, initial=jnp.finfo(logits.dtype).min)
    top = top if sums is None else jnp.maximum(sums.top, top)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1)
    dropped = longer(_dropped(call, of_part, weights), part.slots)
    added = _sums(call, part, dropped, allowed if isolating else None)
    if sums is None:
        return _Sums(top, total, added)
    shrink = jnp.exp(sums.top - top)
    of_rows = shrink.reshape(*added.shape[:-1], 1)
    return _Sums(top, sums.total * shrink + total, sums.output * of_rows + added)


def _logits(problem: Problem, operands: Operands, part):
    """Gives the logits BNTS, and which of them count."""
    at, (B, N, T, S) = index(problem, operands), problem.sizes.BNTS
    products = scaled_products(problem, operands, part)
    products = products.reshape(B, N, T, part.slots)[..., :S]
    allowed = shared.allowed(problem, operands, at)
    return shared.logits(problem, operands, at, products), allowed


def _dropped(problem: Problem, operands: Operands, weights):
    if operands.rng is None:
        return weights
    query_bits, key_bits = operands.rng
    kept = keep(query_bits, key_bits, problem.rate)
    return jnp.where(kept, weights / (1 - problem.rate), 0)


def _sums(problem: Problem, part, weights, allowed):
    """Gives the values in proportion to weights, BKRD; `allowed` isolates NaN."""
    shape, S = weights.shape, weights.shape[-1]
    rows = lambda x: jnp.broadcast_to(x, shape).reshape(shape[0], part.num_heads, -1, S)
    weights = rows(weights)
    if allowed is None:
        return part.sums(weights, problem.wide)
    values = part.vectors_of_values(problem.wide)
    total = jnp.einsum("BKRS,BKSD->BKRD", weights, shared.isolate(values)[0])
    return total + shared.spoiled(weights, values, rows(allowed))
