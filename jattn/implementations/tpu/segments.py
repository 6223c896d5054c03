"""The backward pass in segments of queries, for more queries than one kernel can hold.

A kernel keeps the cotangents of all its queries in VMEM. So long inputs are cut into
segments of queries. One kernel runs for each segment, and the cotangents of keys and values
are summed over the segments.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.implementations.tpu.backward import backward
from jattn.implementations.tpu.call import Arguments, Call
from jattn.implementations.tpu.layout import kind


def in_segments(call: Call, wanted, arguments: Arguments):
    """Runs `backward` on each segment; the schedule has segments as its first axis."""
    segments = arguments.words.shape[0]
    if segments == 1:
        return backward(call, wanted, arguments._replace(words=arguments.words[0]))
    plan = call.plan._replace(queries=call.plan.queries // segments)
    one = dataclasses.replace(call, plan=plan)
    query, key, value, *rows = arguments.inputs
    leaves, tree = jax.tree.flatten(arguments.extras)
    likes = jax.tree.leaves(call.shapes)
    along = [kind(like) != "column" and like.shape[2] > 1 for like in likes]
    flags = zip(likes, along, jax.tree.leaves(wanted), strict=True)
    # Cotangents that go along the queries are joined; all others are summed.
    stacked = [True, False, False, *(many for _, many, want in flags if want)]

    def cut(array):
        array = array.reshape(*array.shape[:-1], segments, -1)
        return jnp.moveaxis(array, -2, 0)

    def run(xs):
        """Computes the results of one segment: those to sum, and those to join."""
        words, (query, *rows), some = xs
        some = iter(some)
        read = [next(some) if many else x for x, many in zip(leaves, along, strict=True)]
        given = Arguments(
            words,
            arguments.count,
            arguments.numbers,
            (query, key, value, *rows),
            tree.unflatten(read),
        )
        results = list(zip(backward(one, wanted, given), stacked, strict=True))
        return [x for x, own in results if not own], [x for x, own in results if own]

    def step(sums, xs):
        added, joined = run(xs)
        return [x + y for x, y in zip(sums, added, strict=True)], joined

    def join(array):
        array = jnp.moveaxis(array, 0, -2)
        return array.reshape(*array.shape[:-2], -1)

    xs = (
        arguments.words,
        tuple(map(cut, (query, *rows))),
        [cut(x) for x, many in zip(leaves, along, strict=True) if many],
    )
    # Only the shapes are computed here, to start the sums with zeros.
    types, _ = jax.eval_shape(run, jax.tree.map(lambda x: x[0], xs))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in types]
    sums, parts = jax.lax.scan(step, zeros, xs)
    sums, parts = iter(sums), iter(parts)
    return [join(next(parts)) if own else next(sums) for own in stacked]
