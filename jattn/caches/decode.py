"""A few queries by the tokens of a store: in the time that what is filled takes.

    at most FIRST slots are filled     these alone, cut from the store
    at most half of them               a loop over chunks, each cut from the store
    more                               all slots at once, where they lie

To cut is to copy, which takes as long as to attend: so beyond a half it is faster to look
at every slot, and nothing is ever copied but a chunk. Vectors that have to be widened,
those that are rounded, always go by chunks, or XLA would widen all of them.

Each part is exact for every mask, modifier, bias and dropout: its logits are made as in any
tile, and parts add up as blocks do everywhere in the library, by a running maximum:

    top ← max(top, max logit)      total ← total · e^(old top − top) + Σ e^(logit − top)
                                   output ← likewise, with the values

On TPU a kernel reads the blocks of slots that the mask of each example leaves, where it
knows how, and what it refuses goes by the parts above. Derivatives are those of whole rows,
of any order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jattn.caches.by_kernel import by_kernel, refusal
from jattn.caches.source import Source, cut
from jattn.call.problem import Operands, Problem, index
from jattn.dropout import keep
from jattn.implementations import shared
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.implementations.kernel import types_of_sums
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.operations.mapped import cond_any
from jattn.operations.operation import Operation, restrict

# How many slots the shortest part has. One of 128 takes 0.1 ms, mostly of starting threads;
# one of 256 a third longer.
FIRST = 128
# How many slots a chunk has. With 512 a chunk of a cache of 8192 slots is 6 % of it; with
# 128 what a step of the loop costs shows.
CHUNK = 256
# How many logits a chunk may have: 8 MB of float32.
LOGITS = 2**21


KERNEL = Decoder()


def attend(problem: Problem, operands: Operands, source: Source, end, kernel=KERNEL):
    """Gives the output BTND and the maximum and the sum BTN, by one operation.

    Args:
        problem: The call.
        operands: Its arrays, without keys and values; the words of dropout are drawn.
        source: Where keys and values are.
        end: A slot that no query sees anything from, as an int32.
        kernel: What computes on its platform.
    """
    leaves, tree = jax.tree.flatten((operands, source, end))
    return Decode(problem, tree, kernel)(*leaves)


@dataclasses.dataclass(frozen=True)
class Decode(Operation):
    """The leaves of operands, source and end to output, maximum and sum, as blockwise.

    Attributes:
        problem: The call.
        tree: The structure of the leaves.
        candidate: The kernel that may run on its platform.
        kernel: That of the current platform.
    """

    problem: Problem
    tree: Any
    candidate: Decoder = KERNEL
    kernel: Decoder | None = dataclasses.field(default=None, kw_only=True)

    @property
    def outputs(self) -> int:
        """Counts output, maximum and sum."""
        return 3

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the index of the values, if they are stored apart and are not rounded."""
        leaves = range(self.tree.num_leaves)
        _, source, _ = self.tree.unflatten(leaves)
        store = getattr(source, "store", source)  # that of the pages, or itself
        apart = store.values is not None and not store.is_rounded
        return frozenset({store.values} if apart else ())

    @property
    def constant(self) -> frozenset[int]:
        """Gives the outputs that do not depend on the values: maximum and sum."""
        return frozenset({1, 2})

    @property
    def elements(self) -> int:
        """Gives all logits, and the weights."""
        B, N, T, S = self.problem.sizes.BNTS
        return 2 * B * N * T * S

    def types(self, *types):
        """Gives BTND, and twice BTN."""
        return types_of_sums(self.problem, types[0])

    def on(self, platform: str) -> "Decode":
        """Chooses the kernel on its platform."""
        kernel = self.candidate if self.candidate.runs_on(platform) else None
        return dataclasses.replace(self, kernel=kernel)

    def fast(self, *leaves, spread):
        """Computes it by the kernel if it can, else by the parts that are filled."""
        operands, source, end = self.tree.unflatten(leaves)
        call, end = (self.problem, operands, source), _furthest(end)
        with jax.default_matmul_precision(self.problem.precision):
            # XLA cannot divide a kernel among devices.
            if self.kernel is None or spread or refusal(self.kernel, *call):
                return _filled(*call, end)
            mend = lambda: _finished(self.problem, _parts(*call, end, isolating=True))
            return by_kernel(self.kernel, *call, mend)

    def reference(self, *leaves):
        """Computes it a few whole rows at a time."""
        operands, source, _ = self.tree.unflatten(leaves)
        with jax.default_matmul_precision(self.problem.precision):
            key, value = source.vectors(self.problem.wide)
            return by_rows(self.problem, operands._replace(key=key, value=value))

    def push(self, active, primals, outputs, tangents, spread):
        """Goes through whole rows, which keep out what is masked."""
        del outputs, spread
        return jax.jvp(*restrict(self.reference, active, primals), tuple(tangents))[1]


@custom_vmap
def _furthest(end):
    return end


@_furthest.def_vmap
def _(size, mapped, end):
    """Takes one end for all slices: JAX would run every branch if they differed."""
    del size, mapped
    return _furthest(jnp.max(end)), False


class _Sums(NamedTuple):
    """What a running maximum has seen: BNT, BNT and BKRD."""

    top: jax.Array
    total: jax.Array
    output: jax.Array


def _filled(problem: Problem, operands: Operands, source: Source, end):
    """Attends to the slots before `end`, and again with care if a value was NaN."""
    run = functools.partial(_parts, problem, operands, source, end)
    sums = run(isolating=False)
    if problem.mask is None:
        return _finished(problem, sums)
    # A NaN in a value that no query sees spoils a product all the same: 0 · NaN is NaN.
    spoiled = ~jnp.all(jnp.isfinite(sums.output))
    output = cond_any(
        spoiled, lambda x: run(isolating=True).output, lambda x: x, sums.output
    )
    return _finished(problem, sums._replace(output=output))


def _parts(problem, operands, source: Source, end, isolating: bool) -> _Sums:
    step = functools.partial(_step, problem, operands, source, isolating)
    slots, start = source.slots, _nothing(problem)
    in_place = source.lies_ready(problem.wide)
    short, chunk = _part_sizes(problem, source)

    def loop(_):
        count = jnp.minimum((end + chunk - 1) // chunk, -(-slots // chunk))
        return lax.fori_loop(0, count, lambda i, sums: step(sums, i * chunk, chunk), start)

    whole = lambda _: step(start, 0, slots)
    if slots <= short:
        return whole(())
    first = lambda _: step(start, 0, short)
    if in_place and not isolating:  # what isolates copies what it reads
        case = (end > short).astype(jnp.int32) + (end > slots // 2).astype(jnp.int32)
        return lax.switch(case, [first, loop, whole], ())
    return lax.cond(end <= short, first, loop, ())


def _part_sizes(problem: Problem, source: Source) -> tuple[int, int]:
    """Gives the slots of the shortest part and of a chunk, multiples of the unit."""
    rows = problem.sizes.B * problem.sizes.N * problem.sizes.T
    chunk = min(CHUNK, max(LOGITS // rows, 64))
    fit = lambda size: min(-(-size // source.unit) * source.unit, source.slots)
    return fit(FIRST), fit(chunk)


def _nothing(problem: Problem) -> _Sums:
    B, N, T, _ = problem.sizes.BNTS
    K, G, D = problem.sizes.K, problem.sizes.G, problem.sizes.D
    zeros = jnp.zeros((B, N, T), problem.wide)
    output = jnp.zeros((B, K, G * T, D), problem.wide)
    return _Sums(zeros - jnp.inf, zeros, output)


def _finished(problem: Problem, sums: _Sums):
    """Gives output BTND, and maximum and sum BTN, of all parts."""
    B, N, T, _ = problem.sizes.BNTS
    total = jnp.where(sums.total == 0, 1, sums.total)
    output = sums.output.reshape(B, N, T, -1) / total[..., None]
    top = jnp.where(sums.top == -jnp.inf, 0, sums.top)
    return tuple(jnp.swapaxes(x, 1, 2) for x in (output, top, sums.total))


def _step(problem, operands, source: Source, isolating, sums: _Sums, first, size: int):
    """Adds the slots from `first` on; those before it were added already."""
    start = first if size == source.slots else jnp.minimum(first, source.slots - size)
    part, of_part = cut(problem, operands, start, size)
    store = source.cut(start, size)
    logits, allowed = _logits(part, of_part, store)
    if size < source.slots:  # the last chunk may begin before its place, to fit
        fresh = start + jnp.arange(size, dtype=jnp.int32)[None, None, None] >= first
        allowed = fresh if allowed is None else allowed & fresh
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
    finite = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - finite[..., None])
    shrink = jnp.exp(sums.top - finite)
    total = sums.total * shrink + jnp.sum(weights, axis=-1)
    weights = _dropped(part, of_part, weights)
    added = _sums(part, store, weights, allowed if isolating else None)
    shrink = shrink.reshape(*added.shape[:-1], 1)
    return _Sums(top, total, sums.output * shrink + added)


def _logits(problem: Problem, operands: Operands, store):
    """Gives the logits BNTS, and which of them count."""
    B, N, T, S = problem.sizes.BNTS
    at = index(problem, operands)
    query = operands.query.astype(problem.wide)
    K, H = store.num_heads, store.head_dim
    rows = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    products = jnp.zeros((B, K, rows.shape[2], S), problem.wide)
    first = 0
    for keys in store.wide_keys(problem.wide):
        part = rows[..., first : first + keys.shape[2]]
        products += jnp.einsum("BKRH,BKHS->BKRS", part, keys)
        first += keys.shape[2]
    if (scales := store.scales(problem.wide)) is not None:
        products = products * scales[0][:, :, None]
    products = operands.scale * products.reshape(B, N, T, S)
    allowed = shared.allowed(problem, operands, at)
    return shared.logits(problem, operands, at, products), allowed


def _dropped(problem: Problem, operands: Operands, weights):
    if operands.rng is None:
        return weights
    query_bits, key_bits = operands.rng
    kept = keep(query_bits, key_bits, problem.rate)
    return jnp.where(kept, weights / (1 - problem.rate), 0)


def _sums(problem: Problem, store, weights, allowed):
    """Gives the values in proportion to weights, BKRD; `allowed` isolates NaN."""
    B, N, T, S = problem.sizes.BNTS
    rows = lambda x: jnp.broadcast_to(x, (B, N, T, S)).reshape(B, store.num_heads, -1, S)
    weights, values = rows(weights), store.wide_values(problem.wide)
    scales = store.scales(problem.wide)
    if allowed is None:
        weights = weights if scales is None else weights * scales[1][:, :, None]
        return _products(weights, values)[..., : store.value_dim]
    values = jnp.concatenate(values, -1)[..., : store.value_dim]
    values = values if scales is None else values * scales[1][..., None]
    values, poison = shared.isolate(values)
    seen = jnp.sum(jnp.where(rows(allowed), poison[:, :, None], 0), axis=-1)
    return _products(weights, [values]) + seen[..., None]


def _products(weights, values):
    parts = [jnp.einsum("BKRS,BKSD->BKRD", weights, x) for x in values]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
