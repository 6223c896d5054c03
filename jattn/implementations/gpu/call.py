"""One call of a kernel: its arrays, its threads, its memory, and how blocks are copied.

Three groups of 128 threads run for each program of the grid. Two of them compute. The
third one copies the blocks of the inner side into the stages of shared memory, in the order
of the schedule, while the others compute:

    ready   the copy of a block has arrived; both computing groups wait for it
    used    both computing groups have read a block; the copier waits for it before it
            copies another block into the same stage
    turn    the two computing groups take turns: one multiplies while the other computes
            its softmax, so that the tensor cores and the rest are busy at the same time
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.call.problem import Problem
from jattn.implementations.gpu.layout import BLOCK, GROUPS, ROWS, Plan
from jattn.implementations.gpu.machine import Machine
from jattn.implementations.gpu.schedule import Steps
from jattn.implementations.joint import Extras, Pairs

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
        """Waits until the block of this stage has arrived, and gives it."""
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot):
        """Says that this group has read the block of this stage."""
        plgpu.barrier_arrive(self.used.at[slot])


class Arguments(NamedTuple):
    """Arguments of a kernel.

    Attributes:
        steps: The schedule.
        numbers: The factors of products, of exponents of 2, and of maxima.
        inputs: B × length × heads × size: what the rows of tiles read, then the blocks.
        vectors: B × N × T in float32: numbers of each query, in backward.
        extras: The arrays that masks, modifiers, bias and dropout read.
    """

    steps: Steps
    numbers: jax.Array
    inputs: tuple[jax.Array, ...]
    vectors: tuple[jax.Array, ...]
    extras: Extras


@dataclasses.dataclass(frozen=True)
class Call:
    """The static description of a call.

    Attributes:
        problem: The call.
        plan: The sizes of its blocks.
        pairs: The programs that join a query and a key.
        shapes: The types of the `Extras` before they were arranged.
        by_query: Whether the rows of tiles are queries; if not, they are keys.
        counts_queries: Whether the positions of queries are 0, 1, 2, …
        machine: The device or its emulator.
    """

    problem: Problem
    plan: Plan
    pairs: Pairs
    shapes: Extras
    by_query: bool
    counts_queries: bool
    machine: Machine

    @property
    def own_form(self) -> str:
        """Says which arrays belong to the rows of tiles."""
        return "row" if self.by_query else "column"

    @property
    def has_padding(self) -> bool:
        """Says whether the last block of keys is partly padding."""
        size = self.plan.inner if self.by_query else BLOCK
        return self.problem.sizes.S % size != 0

    @property
    def is_masked(self) -> bool:
        """Says whether some tiles need a mask."""
        return self.problem.mask is not None or self.has_padding

    @property
    def has_logits(self) -> bool:
        """Says whether the logits are other than the scaled products."""
        return self.problem.modifier is not None or self.shapes.bias is not None

    def run(self, kernel: Callable, arguments: Arguments, own: int, results, name: str):
        """Runs `kernel(context, outputs)` on all rows of all heads.

        Args:
            kernel: What a computing group does.
            arguments: The arguments; the first `own` inputs are read by the rows of tiles.
            own: How many.
            results: For each result its shape after B: it has N heads, as queries have.
            name: A name for profiles.
        """
        B, length = arguments.inputs[0].shape[:2]
        varying = jax.typeof(arguments.inputs[0]).manual_axis_type
        types = [
            jax.ShapeDtypeStruct((B, *shape), jnp.float32, manual_axis_type=varying)
            for shape in results
        ]
        leaves, tree = jax.tree.flatten(arguments)

        def entry(*refs):
            given = tree.unflatten(refs[: len(leaves)])
            outputs = refs[len(leaves) :]
            pl.run_scoped(
                lambda *memory: _program(self, kernel, given, own, outputs, memory),
                *_memory(self, arguments, own),
                collective_axes="group",
            )

        entry.__name__ = name
        return plgpu.kernel(
            entry,
            out_type=types,
            grid=(self.problem.sizes.N, length // BLOCK, B),
            grid_names=("head", "block", "example"),
            num_threads=GROUPS + 1,
            thread_name="group",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.machine.interpret,
        )(*leaves)


def _memory(call: Call, arguments: Arguments, own: int):
    """Describes the shared memory and the barriers of a program."""
    stages = call.plan.stages
    dtype = call.problem.dtype
    owned = [_tiled((GROUPS, ROWS, x.shape[3]), dtype) for x in arguments.inputs[:own]]
    copied = [
        Stream(
            _tiled((stages, call.plan.inner, x.shape[3]), dtype),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=GROUPS),
        )
        for x in arguments.inputs[own:]
    ]
    ready = plgpu.Barrier(num_barriers=GROUPS, num_arrivals=own)
    return owned, copied, ready, plgpu.Barrier(num_arrivals=GROUPS)


def _tiled(shape, dtype):
    """Describes shared memory as wgmma reads it: swizzled tiles of 8 rows."""
    swizzle = plgpu.find_swizzle(shape[-1] * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


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

    call: Call
    given: Arguments
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
        """Runs a loop of which each step takes two turns, one group after the other."""
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


def _program(call: Call, kernel, given: Arguments, own: int, outputs, memory):
    """Runs one program of the grid: this group of threads computes or copies."""
    owned, streams, ready, turn = memory
    b, n, block = (lax.axis_index(x) for x in ("example", "head", "block"))
    if call.by_query:  # under a causal mask the last queries have most to do
        block = lax.axis_size("block") - 1 - block
    group = lax.axis_index("group")
    tables = Steps(*(_of(x, (b, n)) for x in given.steps))
    order = lambda j: tables.order(block, j)
    full, live = tables.full(block), tables.live(block)
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


def _sources(call: Call, refs, n, own: int):
    """Gives the inputs with the head that this program reads of each."""
    head = lax.div(n, np.int32(call.problem.sizes.G))
    owners = (n, head) if call.by_query else (head, n)
    return [Source(ref, owners[i >= own]) for i, ref in enumerate(refs)]


def _copy_blocks(call: Call, b, order, live, sources, streams):
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
