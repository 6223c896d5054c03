"""Cotangents, block by block, on TPU: one kernel with five products for each block.

The outer blocks are blocks of keys. The cotangents of a key block stay in scratch memory
while the kernel visits the queries that see it. The cotangents of all queries of a head,
and of the arrays that rows read, stay in VMEM for the whole head. So each product is
computed once, and no array is as large as queries × blocks.

    d_logitₛ = weightₛ (vₛ · d_output − (δ − d_logsumexp))        δ = output · d_output
    d_vₛ += Σ weightₛ d_output        d_kₛ += Σ d_logitₛ q        d_q += Σₛ d_logitₛ kₛ

The five products are q·kₛ, vₛ · d_output, and one for each of d_v, d_k and d_q.

Reference:
    Dao et al., 2022, arXiv:2205.14135, algorithm 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattn.implementations.joint import kind
from jattn.implementations.shared import harmless, without_doubt
from jattn.implementations.tpu import schedule as steps
from jattn.implementations.tpu.call import Arguments, Call
from jattn.implementations.tpu.layout import LANES, LOG2_E
from jattn.implementations.tpu.tiles import Tile, parts

_VMEM = 60 * 2**20  # bytes: twice `kernel.RESIDENT` for d_query, and room for the blocks


class Refs(NamedTuple):
    """The memory that the kernel reads and writes, in the order of its arguments."""

    inputs: tuple  # queries, keys, values, the cotangent of the output, row numbers
    read: Any  # extras, as a tile reads them
    d_query: Any
    d_key: Any
    d_value: Any
    d_extras: tuple
    key_sum: Any
    value_sum: Any
    key_transposed: Any
    column_sums: tuple

    def begin(self, extras) -> None:
        """Clears what stays for a whole head."""
        self.d_query[...] = jnp.zeros_like(self.d_query)
        for extra, ref in zip(extras, self.d_extras, strict=True):
            if extra.kind == "row":
                ref[...] = jnp.zeros_like(ref)

    def start(self) -> None:
        """Clears what stays for a block of keys, and transposes the keys."""
        # Transposed once for each key block, as the product for d_query needs it.
        self.key_transposed[...] = self.inputs[1][0, 0].T
        for ref in (self.key_sum, self.value_sum, *self.column_sums):
            ref[...] = jnp.zeros_like(ref)

    def finish(self, extras) -> None:
        """Writes what was summed for a block of keys."""
        self.d_key[0, 0] = self.key_sum[...].astype(self.d_key.dtype)
        self.d_value[0, 0] = self.value_sum[...].astype(self.d_value.dtype)
        for extra, ref, total in zip(extras, self.d_extras, self.into(extras), strict=True):
            if extra.kind == "column":
                ref[0, 0] = jnp.sum(total[...].T, axis=0, keepdims=True)

    def into(self, extras) -> list:
        """Gives the memory in which the cotangent of each extra is summed."""
        sums = iter(self.column_sums)
        return [
            next(sums) if extra.kind == "column" else ref
            for extra, ref in zip(extras, self.d_extras, strict=True)
        ]


class Extra(NamedTuple):
    """Where the cotangent of a row or a column goes."""

    kind: str
    shape: tuple[int, int]
    spec: Any


def _extra(call: Call, like) -> Extra:
    """Gives the place of the cotangent of an array with this shape."""
    plan, what = call.plan, kind(like)
    if what == "row":
        many = plan.columns * (plan.queries if like.shape[2] > 1 else 1)
        return Extra(what, (1, many), call.spec((1, 1, 1, many), _whole))
    if what == "column":
        at = lambda b, k, i, j: (b, k, 0, j)
        spec = call.spec((1, 1, 1, plan.block_kv), at)
        return Extra(what, (1, plan.block_kv * plan.keys), spec)
    raise TypeError(f"backward: has no place for the cotangent of a {what}.")


def _whole(b, k, i, j):
    """Gives one block for a whole head: it stays in VMEM while blocks of queries pass."""
    return b, k, 0, 0


def backward(call: Call, wanted, arguments: Arguments):
    """Computes cotangents of queries, keys, values and wanted extras, in float32.

    The inputs are queries, keys, values, the cotangent of the output, and five rows of
    numbers, see `row_numbers`. All of them but keys and values are transposed. Cotangents
    of rows and columns have every example and head; the caller sums over axes that the
    arrays share.
    """
    call = call.of(arguments)
    H, D = call.problem.sizes.H, call.problem.sizes.D
    flags = zip(jax.tree.leaves(call.shapes), jax.tree.leaves(wanted), strict=True)
    extras = [_extra(call, like) for like, want in flags if want]
    tree = jax.tree.structure(arguments.extras)
    return call.run(
        functools.partial(_kernel, call, wanted, extras, tree),
        arguments,
        (
            call.query_spec(H),
            call.key_spec(H),
            call.key_spec(D),
            call.query_spec(D),
            call.query_spec(5),
            call.extra_specs(arguments.extras),
        ),
        name="jattn_backward",
        **_results(call, extras),
        semantics=("parallel", "parallel", "arbitrary"),
        vmem=_VMEM,
    )


def _results(call: Call, extras) -> dict[str, Any]:
    """Says what the kernel writes, and which memory it needs besides."""
    (H, D), plan = (call.problem.sizes.H, call.problem.sizes.D), call.plan
    length, keys = plan.columns * plan.queries, plan.block_kv * plan.keys
    heads = lambda size: call.spec(
        (1, 1, plan.block_kv, size), lambda b, k, i, j: (b, k, j, 0)
    )
    shapes = (H, length), (keys, H), (keys, D), *(extra.shape for extra in extras)
    specs = call.spec((1, 1, H, length), _whole), heads(H), heads(D)
    columns = sum(extra.kind == "column" for extra in extras)
    return {
        "out_specs": (*specs, *(extra.spec for extra in extras)),
        "out_shape": [call.result(shape) for shape in shapes],
        "scratch_shapes": [
            pltpu.VMEM((plan.block_kv, H), jnp.float32),
            pltpu.VMEM((plan.block_kv, D), jnp.float32),
            pltpu.VMEM((H, plan.block_kv), call.problem.dtype),
            *[pltpu.VMEM((plan.block_kv, LANES), jnp.float32)] * columns,
        ],
    }


def _kernel(call: Call, wanted, extras, tree, words, numbers, *memory):
    """Adds the cotangents of one block to the sums; the first and last do more."""
    given, memory = memory[:5], memory[5:]
    read, memory = memory[: tree.num_leaves], memory[tree.num_leaves :]
    d_query, d_key, d_value, *memory = memory
    d_extras, memory = tuple(memory[: len(extras)]), memory[len(extras) :]
    key_sum, value_sum, key_transposed, *sums = memory
    read = jax.tree.unflatten(tree, read)
    results = d_query, d_key, d_value, d_extras
    refs = Refs(given, read, *results, key_sum, value_sum, key_transposed, tuple(sums))
    word = call.word(words)
    pl.when(pl.program_id(2) == 0)(lambda: refs.begin(extras))
    pl.when(word & steps.FIRST != 0)(refs.start)

    def block(masked):
        _backward_block(call, refs, numbers, refs.into(extras), word, (masked, wanted))

    call.over_kinds(word, block)
    pl.when(word & steps.LAST != 0)(lambda: refs.finish(extras))


def _backward_block(call: Call, refs: Refs, numbers, into, word, options):
    """Adds the cotangents that come from the pairs of a query block and a key block."""
    (query, key, value, d_output, _), (j, i) = refs.inputs, steps.blocks(word)
    dot = functools.partial(_dot, call)

    def products(part):
        at = (0, 0, slice(None), part.columns)
        return (
            dot(key[0, 0, part.keys, :], query[at]),
            dot(value[0, 0, part.keys, :], d_output[at]),
        )

    todo = parts(call.plan, *call.tuning)
    # The products of the next part start before the work on this one, so that the matrix
    # unit is busy meanwhile.
    coming = products(todo[0])
    for part, following in zip(todo, [*todo[1:], None], strict=True):
        logits, d_weights = coming
        if call.problem.dtype != jnp.float32:  # in float32 the queries are scaled already
            logits = logits * numbers[0]
        if following is not None:
            coming = products(following)
        tile = Tile(call, call.pairs, refs.read, j, part)
        found = _of_tile(call, tile, refs.inputs[4], logits, d_weights, options)
        dropped, d_logits, d_chosen = found
        _add(call, into, jax.tree.leaves(d_chosen), part, i)
        columns = (0, 0, slice(None), part.columns)
        narrow = d_logits.astype(query.dtype)
        refs.value_sum[part.keys, :] += dot(
            dropped.astype(query.dtype), d_output[columns], across=1
        )
        refs.key_sum[part.keys, :] += dot(narrow, query[columns], across=1)
        first = pl.multiple_of(i * call.plan.columns, LANES) + part.columns.start
        where = (0, 0, slice(None), pl.ds(first, part.shape[1]))
        refs.d_query[where] += dot(refs.key_transposed[:, part.keys], narrow)


def _dot(call: Call, x, y, across=0):
    """Multiplies matrices, in float32, along the second axis of the first."""
    return lax.dot_general(
        x,
        y,
        (((1,), (across,)), ((), ())),
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )


def _of_tile(call: Call, tile: Tile, rows, logits, d_weights, options):
    """Computes the weights after dropout of a tile, and the cotangents of its logits.

    Gives also the cotangents of the wanted arrays that the modifier and the bias read.
    """
    masked, wanted = options
    allowed = tile.allowed(call.has_padding) if masked else None
    pull = None
    if call.pairs.modifier is not None or tile.read.bias is not None:
        if call.pairs.modifier is not None:
            logits = harmless(logits, allowed)
        chosen, fill = _choose(tile.active, (wanted.modifier, wanted.bias))
        logits, pull = jax.vjp(lambda x, y: tile.logits(x, fill(y)), logits, chosen)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top, inverse, doubt, delta, offset = (
        rows[0, 0, which : which + 1, tile.part.columns] for which in range(5)
    )
    # At most 1, even if the products were summed in another order than in forward.
    exponentials = jnp.exp2(jnp.minimum(logits - top, 0) * LOG2_E)
    weights = exponentials * inverse
    kept, dropped = tile.kept(), weights
    if kept is not None:
        grown = 1 / (1 - call.problem.rate)
        d_weights = jnp.where(kept, d_weights * grown, 0)
        dropped = jnp.where(kept, weights * grown, 0)
    d_weights = without_doubt(d_weights, delta, doubt)
    d_logits = weights * (d_weights - offset)
    if pull is None:
        return dropped, d_logits, ()
    d_logits, d_chosen = pull(d_logits)
    if allowed is not None:
        d_logits = jnp.where(allowed, d_logits, 0)
    return dropped, d_logits, d_chosen


def _choose(active, wanted):
    """Picks the wanted leaves, and makes a function that puts new ones in their place."""
    leaves, tree = jax.tree.flatten(active)
    flags = jax.tree.leaves(wanted)
    chosen = [x for x, want in zip(leaves, flags, strict=True) if want]

    def fill(chosen):
        chosen = iter(chosen)
        filled = [
            next(chosen) if want else x for x, want in zip(leaves, flags, strict=True)
        ]
        return tree.unflatten(filled)

    return chosen, fill


def _add(call: Call, into, cotangents, part, i):
    """Adds the cotangents of rows and columns to their sums."""
    for ref, cotangent in zip(into, cotangents, strict=True):
        cotangent = cotangent.astype(jnp.float32)
        if cotangent.shape[0] == 1:  # a row, of one block or of all
            many = ref.shape[3] > call.plan.columns
            first = pl.multiple_of(i * call.plan.columns, LANES) if many else 0
            where = (0, 0, slice(None), pl.ds(first + part.columns.start, part.shape[1]))
            ref[where] += cotangent
        else:
            # Each of the 128 lanes holds 1/128 of the column; `_finish` sums up the lanes.
            lanes = jnp.broadcast_to(cotangent * (1 / LANES), (part.shape[0], LANES))
            ref[part.keys, :] += lanes
