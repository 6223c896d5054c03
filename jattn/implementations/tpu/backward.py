"""Cotangents, block by block, on TPU: one kernel with five products a block.

The outer blocks are of keys. Their cotangents stay in scratch while the queries that see
them pass by; those of all queries of a head, and of what rows read, stay in VMEM for the
whole head. So each product is taken once, and nothing is as large as queries × blocks.

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

_VMEM = 60 * 2**20


def backward(call: Call, wanted, arguments: Arguments):
    """Cotangents of queries, keys and values in float32, and of the wanted extras.

    The inputs are queries, keys, values, the output's cotangent, and five rows of
    numbers, see `row_numbers`; all but keys and values transposed. Cotangents of rows and
    columns are for each example and head, of tiles for each that they have.
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
    """Adds what one block of queries and one of keys have to do with each other."""
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
    coming = products(todo[0])
    for part, following in zip(todo, [*todo[1:], None], strict=True):
        logits, d_weights = coming
        if call.problem.dtype != jnp.float32:  # else queries are scaled
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
        # Never above 1, also where products were summed in another order than forward.
        exponentials = jnp.exp2(jnp.minimum(logits - top, 0) * LOG2_E)
        weights = exponentials * inverse
        kept, dropped = tile.kept(), weights
        if kept is not None:
            d_weights = jnp.where(kept, d_weights * (1 / (1 - rate)), 0)
            dropped = jnp.where(kept, weights * (1 / (1 - rate)), 0)
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
    """The leaves that are wanted, and how to put such in their place."""
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
            lanes = jnp.broadcast_to(cotangent * (1 / LANES), (part.shape[0], LANES))
            ref[part.keys, :] += lanes
