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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattn.implementations.shared import harmless
from jattn.implementations.tpu import schedule as steps
from jattn.implementations.tpu.call import Arguments, Call
from jattn.implementations.tpu.layout import LANES, LOG2_E, kind
from jattn.implementations.tpu.tiles import Tile, parts

_VMEM = 60 * 2**20  # bytes: twice `kernel.RESIDENT` for d_query, and room for the blocks


def backward(call: Call, wanted, arguments: Arguments):
    """Computes cotangents of queries, keys, values and wanted extras, in float32.

    The inputs are queries, keys, values, the cotangent of the output, and five rows of
    numbers, see `row_numbers`. All of them but keys and values are transposed. Cotangents
    of rows and columns have every example and head; the caller sums over axes that the
    arrays share.
    """
    call = call.of(arguments)
    sizes, plan = call.problem.sizes, call.plan
    length, keys = plan.columns * plan.queries, plan.block_kv * plan.keys
    wide, tree = jnp.float32, jax.tree.structure(arguments.extras)
    shapes = [
        like
        for like, want in zip(
            jax.tree.leaves(call.shapes), jax.tree.leaves(wanted), strict=True
        )
        if want
    ]
    kinds = [kind(like) for like in shapes]
    # One block for the whole head: it stays in VMEM while blocks of queries pass.
    whole = lambda b, k, i, j: (b, k, 0, 0)
    extra_out, extra_specs, scratch = [], [], []
    for like in shapes:
        what = kind(like)
        if what == "row":
            many = length if like.shape[2] > 1 else plan.columns
            extra_out.append((1, many))
            extra_specs.append(call.spec((1, 1, 1, many), whole))
        elif what == "column":
            extra_out.append((1, keys))
            at = lambda b, k, i, j: (b, k, 0, j)
            extra_specs.append(call.spec((1, 1, 1, plan.block_kv), at))
            scratch.append(pltpu.VMEM((plan.block_kv, LANES), wide))
        else:
            raise TypeError(f"backward: has no place for the cotangent of a {what}.")

    def kernel(words, numbers, *refs):
        # Arguments come in this order: inputs, extras, results, scratch memory.
        given, refs = refs[:5], refs[5:]
        read, refs = refs[: tree.num_leaves], refs[tree.num_leaves :]
        read = jax.tree.unflatten(tree, read)
        (d_query, d_key, d_value), refs = refs[:3], refs[3:]
        d_extras, refs = refs[: len(shapes)], refs[len(shapes) :]
        (key_sum, value_sum, key_transposed), sums = refs[:3], refs[3:]
        word = call.word(words)
        column_sums = iter(sums)
        into = [
            next(column_sums) if what == "column" else ref
            for what, ref in zip(kinds, d_extras, strict=True)
        ]

        @pl.when(pl.program_id(2) == 0)
        def _begin():
            d_query[...] = jnp.zeros_like(d_query)
            for what, ref in zip(kinds, d_extras, strict=True):
                if what == "row":
                    ref[...] = jnp.zeros_like(ref)

        @pl.when(word & steps.FIRST != 0)
        def _start():
            # Transposed once for each key block, as the product for d_query needs it.
            key_transposed[...] = given[1][0, 0].T
            for ref in (key_sum, value_sum, *sums):
                ref[...] = jnp.zeros_like(ref)

        def block(masked):
            j, i = steps.blocks(word)
            state = (d_query, key_sum, value_sum, key_transposed, into)
            _backward_block(call, (given, read, numbers), state, (i, j), (masked, wanted))

        call.over_kinds(word, block)

        @pl.when(word & steps.LAST != 0)
        def _finish():
            d_key[0, 0] = key_sum[...].astype(d_key.dtype)
            d_value[0, 0] = value_sum[...].astype(d_value.dtype)
            for what, ref, total in zip(kinds, d_extras, into, strict=True):
                if what == "column":
                    ref[0, 0] = jnp.sum(total[...].T, axis=0, keepdims=True)

    heads = lambda size: call.spec(
        (1, 1, plan.block_kv, size), lambda b, k, i, j: (b, k, j, 0)
    )
    return call.run(
        kernel,
        arguments,
        (
            call.query_spec(sizes.H),
            call.key_spec(sizes.H),
            call.key_spec(sizes.D),
            call.query_spec(sizes.D),
            call.query_spec(5),
            call.extra_specs(arguments.extras),
        ),
        name="jattn_backward",
        out_specs=(
            call.spec((1, 1, sizes.H, length), whole),
            heads(sizes.H),
            heads(sizes.D),
            *extra_specs,
        ),
        out_shape=[
            call.result((sizes.H, length)),
            call.result((keys, sizes.H)),
            call.result((keys, sizes.D)),
            *map(call.result, extra_out),
        ],
        scratch_shapes=[
            pltpu.VMEM((plan.block_kv, sizes.H), wide),
            pltpu.VMEM((plan.block_kv, sizes.D), wide),
            pltpu.VMEM((sizes.H, plan.block_kv), call.problem.dtype),
            *scratch,
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        vmem=_VMEM,
    )


def _backward_block(call: Call, inputs, state, at, options):
    """Adds the cotangents that come from the pairs of a query block and a key block."""
    (query, key, value, d_output, rows), read, numbers = inputs
    d_query, key_sum, value_sum, key_transposed, into = state
    (i, j), (masked, wanted) = at, options
    size, rate = numbers[0], call.problem.rate
    plain = call.pairs.modifier is None and read.bias is None

    def dot(x, y, across=0):
        return lax.dot_general(
            x,
            y,
            (((1,), (across,)), ((), ())),
            precision=call.precision,
            preferred_element_type=jnp.float32,
        )

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
            logits = logits * size
        if following is not None:
            coming = products(following)
        tile = Tile(call, call.pairs, read, j, part)
        pull = None
        allowed = tile.allowed(call.has_padding) if masked else None
        if not plain:
            if call.pairs.modifier is not None:
                logits = harmless(logits, allowed)
            chosen, fill = _choose(tile.active, (wanted.modifier, wanted.bias))
            logits, pull = jax.vjp(
                lambda x, chosen, tile=tile, fill=fill: tile.logits(x, fill(chosen)),
                logits,
                chosen,
            )
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        columns = (0, 0, slice(None), part.columns)
        top, inverse, settled, delta, offset = (
            rows[0, 0, which : which + 1, part.columns] for which in range(5)
        )
        # At most 1, even if the products were summed in another order than in forward.
        exponentials = jnp.exp2(jnp.minimum(logits - top, 0) * LOG2_E)
        weights = exponentials * inverse
        kept, dropped = tile.kept(), weights
        if kept is not None:
            d_weights = jnp.where(kept, d_weights * (1 / (1 - rate)), 0)
            dropped = jnp.where(kept, weights * (1 / (1 - rate)), 0)
        # Where a weight is 1, vₛ · d_output = δ exactly; see `shared.row_factors`.
        d_weights = jnp.where(exponentials > settled, delta, d_weights)
        d_logits = weights * (d_weights - offset)
        if pull is not None:
            d_logits, d_chosen = pull(d_logits)
            if allowed is not None:
                d_logits = jnp.where(allowed, d_logits, 0)
            _add(call, into, jax.tree.leaves(d_chosen), part, i)
        narrow = d_logits.astype(query.dtype)
        value_sum[part.keys, :] += dot(
            dropped.astype(query.dtype), d_output[columns], across=1
        )
        key_sum[part.keys, :] += dot(narrow, query[columns], across=1)
        first = pl.multiple_of(i * call.plan.columns, LANES) + part.columns.start
        where = (0, 0, slice(None), pl.ds(first, part.shape[1]))
        d_query[where] += dot(key_transposed[:, part.keys], narrow)


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
