"""The backward pass in segments of queries, for more queries than one kernel can hold.

A kernel keeps the cotangents of all its queries in VMEM. So long inputs are cut into
segments of queries. One kernel runs for each segment, and the cotangents of keys and values
are summed over the segments.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.implementations.joint import kind
from jattn.implementations.tpu.backward import backward
from jattn.implementations.tpu.call import Arguments, Call


def in_segments(call: Call, wanted, arguments: Arguments):
    """Runs `backward` on each segment; the schedule has segments as its first axis."""
    segments = arguments.words.shape[0]
    if segments == 1:
        return backward(call, wanted, arguments._replace(words=arguments.words[0]))
    plan = call.plan._replace(queries=call.plan.queries // segments)
    one = dataclasses.replace(call, plan=plan)
    along = [_along_queries(like) for like in jax.tree.leaves(call.shapes)]
    flags = zip(along, jax.tree.leaves(wanted), strict=True)
    # Cotangents that go along the queries are joined; all others are summed.
    stacked = [True, False, False, *(many for many, want in flags if want)]

    def step(sums, xs):
        results = backward(one, wanted, _with_segment(arguments, along, xs))
        added, joined = _apart(results, stacked)
        return [x + y for x, y in zip(sums, added, strict=True)], joined

    xs = _segments(arguments, along, segments)
    # Only the shapes are computed here, to start the sums with zeros.
    first = _with_segment(arguments, along, jax.tree.map(lambda x: x[0], xs))
    types, _ = _apart(jax.eval_shape(lambda x: backward(one, wanted, x), first), stacked)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in types]
    sums, parts = map(iter, jax.lax.scan(step, zeros, xs))
    return [_join(next(parts)) if own else next(sums) for own in stacked]


def _along_queries(like) -> bool:
    """Says whether an array of this shape has numbers of each query."""
    return kind(like) != "column" and like.shape[2] > 1


def _segments(arguments: Arguments, along, segments: int):
    """Gives what each segment has of its own: its schedule, rows, and extras."""

    def cut(array):
        array = array.reshape(*array.shape[:-1], segments, -1)
        return jnp.moveaxis(array, -2, 0)

    query, _, _, *rows = arguments.inputs
    extras = zip(jax.tree.leaves(arguments.extras), along, strict=True)
    own = [cut(x) for x, many in extras if many]
    return arguments.words, tuple(map(cut, (query, *rows))), own


def _with_segment(arguments: Arguments, along, xs) -> Arguments:
    """Gives the arguments of one segment."""
    words, (query, *rows), own = xs
    leaves, tree = jax.tree.flatten(arguments.extras)
    own = iter(own)
    read = [next(own) if many else x for x, many in zip(leaves, along, strict=True)]
    inputs = (query, *arguments.inputs[1:3], *rows)
    return arguments._replace(words=words, inputs=inputs, extras=tree.unflatten(read))


def _apart(results, stacked):
    """Takes apart the results that are summed over segments and those that are joined."""
    pairs = list(zip(results, stacked, strict=True))
    return [x for x, own in pairs if not own], [x for x, own in pairs if own]


def _join(array):
    """Joins what segments of queries have, along the last axis."""
    array = jnp.moveaxis(array, 0, -2)
    return array.reshape(*array.shape[:-2], -1)
