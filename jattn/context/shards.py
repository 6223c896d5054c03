"""A call cut into shards, and run on each device."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jattn.call.problem import Operands, Problem
from jattn.context.exchange import copied, heads_to_sequence, sequence_to_heads
from jattn.context.gather import Gather
from jattn.context.merge import combined_over
from jattn.context.place import Place
from jattn.context.ring import Ring
from jattn.context.turns import turns as count_turns
from jattn.context.ways import part_of, prepare, rows_spec, specs, ways
from jattn.implementations import dispatch
from jattn.implementations.attention import Attention
from jattn.implementations.kernel import Kernel
from jattn.implementations.sums import Sums, given_as
from jattn.state import State

__all__ = ["attention_state"]


def attention_state(
    problem: Problem,
    operands: Operands,
    sink,
    place: Place,
    names: tuple[str, ...],
    turns: Any,
) -> State:
    """Gives the state of the whole, BTND in the dtype of the inputs and BTN.

    `names` are the implementations that may run, `turns` how many of a ring find
    anything, None where that is known only when it runs.
    """
    found: list[Any] = [dispatch.IMPLEMENTATIONS[name] for name in names]
    # Those that round their sums have no rule that parts share.
    kernels = tuple(x for x in found if isinstance(x, Kernel) and x.exact)
    if place.is_ring and turns is None:
        turns = count_turns(problem, operands, place.count(place.round))
    problem, operands = prepare(problem, operands)
    if place.strategy == "merge":  # all devices have the queries, and add up cotangents
        operands = operands._replace(query=operands.query.astype(problem.wide))
    part = part_of(problem, place)
    core = functools.partial(_core, part, place, kernels, ways(operands))
    output: Any = rows_spec(place, () if place.strategy == "merge" else place.axis)
    sink_spec = PartitionSpec((*place.heads, *place.swapped) or None)
    known = turns if isinstance(turns, int) else None
    mapped = jax.shard_map(
        functools.partial(_shard, core, place, known, problem.dtype),
        mesh=place.mesh,
        in_specs=(specs(operands, place), sink_spec, PartitionSpec()),
        out_specs=State(output, output),
        axis_names=place.names,
    )
    return mapped(operands, sink, None if known else turns)


def _shard(core, place: Place, known, dtype, operands: Operands, sink, turns) -> State:
    """Attends on one device."""
    swapped = place.swapped
    if swapped:
        count = place.count(swapped)
        key, value = (copied(x, count) for x in (operands.key, operands.value))
        arrays = (heads_to_sequence(x, swapped) for x in (operands.query, key, value))
        operands = operands._replace(**dict(zip(operands._fields[:3], arrays, strict=True)))
    sums = core(operands, known or turns)
    if place.strategy == "merge":
        sums = combined_over(sums, place.axis)
    state: Any = given_as("state", sums, sink, dtype)
    if swapped:
        state = jax.tree.map(lambda x: sequence_to_heads(x, swapped), state)
    return state


def _core(problem: Problem, place: Place, kernels, ways, operands, turns) -> Sums:
    """Gives the sums of this device's queries, unrounded."""
    leaves, tree = jax.tree.flatten(operands)
    axis = place.round
    problem = dataclasses.replace(problem, part=place.is_ring)
    inner = Attention(problem, tree, None, kernels)
    spread = inner, axis, place.count(axis), ways
    if place.is_ring:
        known = turns if isinstance(turns, int) else None
        leaves = leaves if known else [*leaves, turns]
        return Sums(*Ring(*spread, known)(*leaves))
    if place.strategy == "gather":
        return Sums(*Gather(*spread)(*leaves))
    return Sums(*inner(*leaves))
