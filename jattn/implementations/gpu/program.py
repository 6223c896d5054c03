"""One program of the grid: its groups of threads, its copies and its turns.

Three groups of 128 threads run for each program of the grid. Two of them compute. The
third one copies the blocks of the inner side into the stages of shared memory, in the order
of the schedule, while the others compute:

    ready   the copy of a block has arrived; both computing groups wait for it
    used    both computing groups have read a block; the copier waits for it before it
            copies another block into the same stage
    turn    the two computing groups take turns: one multiplies while the other computes
            its softmax, so that the tensor cores and the rest are busy at the same time
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.implementations.gpu.layout import BLOCK, GROUPS, ROWS

# Registers of a thread: 168 each would be all, and the copier needs few of them.
_COMPUTE, _COPY = 232, 40


class Source(NamedTuple):
    """An input in global memory and the number of its head, as a kernel reads it."""

    ref: Any
    head: Any

    def at(self, b, rows):
        """Gives some rows of an example."""
        return self.ref.at[b, rows, self.head]


class Stream(NamedTuple):
    """Blocks of an input, as they pass through shared memory."""

    memory: Any
    ready: Any
    used: Any

    def wait(self, slot):
        """Waits until the block of this stage has arrived."""
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot):
        """Says that this group has read the block of this stage."""
        plgpu.barrier_arrive(self.used.at[slot])


class Context(NamedTuple):
    """What a computing group knows.

    Attributes:
        call: The call.
        given: The arguments, in global memory.
        at: The example and the head.
        rows: The rows of this group, as a slice of all of them.
        own: What the rows read, in shared memory.
        streams: The blocks of the other side.
        order: A function from the number of a step to its inner block.
        full: How many steps need no mask.
        live: How many steps there are.
        group: The number of this group.
        turn: A function that waits for this group's turn.
    """

    call: Any
    given: Any
    at: tuple
    rows: Any
    own: tuple
    streams: tuple
    order: Callable
    full: Any
    live: Any
    group: Any
    turn: Callable

    def in_turns(self, loop: Callable):
        """Runs a loop whose steps take two turns each; the two groups alternate."""
        pl.when(self.group == 1)(self.turn)
        result = loop()
        pl.when(self.group == 0)(self.turn)
        return result

    def loop(self, step: Callable, start):
        """Runs `step(masked, j, carry)` on full blocks, then on partial ones."""
        unmasked = lambda j, carry: step(False, j, carry)
        if not self.call.is_masked:
            return lax.fori_loop(0, self.live, unmasked, start)
        carry = lax.fori_loop(0, self.full, unmasked, start)
        return lax.fori_loop(
            self.full, self.live, lambda j, carry: step(True, j, carry), carry
        )

    def first(self, j):
        """Gives the stage of a step, and the first of the inner rows that it reads."""
        return lax.rem(j, np.int32(self.call.plan.stages)), (
            self.order(j) * self.call.plan.inner
        )


def run_program(call: Any, kernel, given: Any, own: int, outputs, memory):
    """Runs one program of the grid: this group of threads computes or copies."""
    owned, streams, ready, turn = memory
    b, n, block = (lax.axis_index(x) for x in ("example", "head", "block"))
    if call.by_query:  # under a causal mask the last queries have most to do
        block = lax.axis_size("block") - 1 - block
    group = lax.axis_index("group")
    order, full, live = (_of(x, (b, n)) for x in given.steps)
    order, full, live = functools.partial(order, block), full(block), live(block)
    inputs = _sources(call, given.inputs, n, own)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(_COMPUTE, action="increase")
        rows = pl.ds(block * BLOCK + group * ROWS, ROWS)
        for source, ref in zip(inputs[:own], owned, strict=True):
            plgpu.copy_gmem_to_smem(source.at(b, rows), ref.at[group], ready.at[group])
        plgpu.barrier_wait(ready.at[group])

        def wait():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        own_memory = tuple(ref.at[group] for ref in owned)
        context = Context(
            call, given, (b, n), rows, own_memory, streams, order, full, live, group, wait
        )
        kernel(context)(outputs)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(_COPY, action="decrease")
        _copy_blocks(call, b, order, live, inputs[own:], streams)


def _of(ref, at):
    """Gives a function that reads the numbers of an example and a head from a table."""
    b, n = (0 if size == 1 else i for size, i in zip(ref.shape[:2], at, strict=True))
    return lambda *place: ref[(b, n, *place)]


def _sources(call: Any, refs, n, own: int):
    """Gives the inputs with the head that this program reads of each."""
    head = lax.div(n, np.int32(call.problem.sizes.G))
    owners = (n, head) if call.by_query else (head, n)
    return [Source(ref, owners[i >= own]) for i, ref in enumerate(refs)]


def _copy_blocks(call: Any, b, order, live, sources, streams):
    """Copies block after block, as stages become free."""
    stages, inner = np.int32(call.plan.stages), call.plan.inner

    def step(j, _):
        slot, rows = lax.rem(j, stages), pl.ds(order(j) * inner, inner)
        for source, stream in zip(sources, streams, strict=True):
            pl.when(j >= stages)(lambda s=stream: plgpu.barrier_wait(s.used.at[slot]))
            plgpu.copy_gmem_to_smem(
                source.at(b, rows), stream.memory.at[slot], stream.ready.at[slot]
            )
        return _

    lax.fori_loop(0, live, step, None)

    def drain(j, _):  # a program ends with all barriers waited for
        for stream in streams:
            plgpu.barrier_wait(stream.used.at[lax.rem(j, stages)])
        return _

    lax.fori_loop(jnp.maximum(live - stages, 0), live, drain, None)
