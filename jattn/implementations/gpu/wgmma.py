"""Hopper: products by `wgmma`, and a third group of threads that copies.

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

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jattn.implementations.gpu.layout import GROUPS, ROWS
from jattn.implementations.gpu.machine import Machine, plgpu, tiled
from jattn.implementations.gpu.program import Program

# Registers of a thread: 168 each would be all, and the copier needs few of them.
_COMPUTE, _COPY = 232, 40


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


@dataclasses.dataclass(frozen=True)
class Wgmma(Machine):
    """A Hopper GPU."""

    threads = GROUPS + 1

    def memory(self, call, arguments, own):
        """Describes the shared memory and the barriers of a program."""
        stages, dtype = call.plan.stages, call.problem.dtype
        owned = [tiled((GROUPS, ROWS, x.shape[3]), dtype) for x in arguments.inputs[:own]]
        copied = [
            Stream(
                tiled((stages, call.plan.inner, x.shape[3]), dtype),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages, num_arrivals=GROUPS),
            )
            for x in arguments.inputs[own:]
        ]
        ready = plgpu.Barrier(num_barriers=GROUPS, num_arrivals=own)
        return owned, copied, ready, plgpu.Barrier(num_arrivals=GROUPS)

    def run(self, program, kernel, outputs, memory):
        """Runs a program: two groups compute, and the third one copies."""
        owned, streams, ready, turn = memory
        group = program.group

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(_COMPUTE, action="increase")
            for source, ref in zip(program.own, owned, strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at(program.at[0], program.rows), ref.at[group], ready.at[group]
                )
            plgpu.barrier_wait(ready.at[group])

            def wait():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            own = tuple(ref.at[group] for ref in owned)
            kernel(program.context(own, streams, turn=wait))(outputs)

        @pl.when(group == GROUPS)
        def _copy():
            plgpu.set_max_registers(_COPY, action="decrease")
            _copy_blocks(program, streams)

    def products(self, x, y, meanwhile: Callable = lambda: None):
        """Multiplies each row of x by each row of y, both in shared memory."""

        def run(sums):
            plgpu.wgmma(sums, x, y.transpose((1, 0)))
            meanwhile()
            return sums[...]

        return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[0]), jnp.float32))

    def add(self, sums, x, y):
        """Computes sums + x y, with x in registers and y in shared memory."""
        if self.interpret:
            return sums + self.emulated(x, y[...])
        narrow = x.astype(y.dtype)
        run = lambda ref: plgpu.wgmma(ref, narrow, y)
        return pl.run_state(run)(plgpu.ACC.init(sums))


def _copy_blocks(program: Program, streams):
    """Copies block after block, as stages become free."""
    stages = np.int32(program.call.plan.stages)

    def step(j, _):
        slot, rows = lax.rem(j, stages), program.inner_rows(j)
        for source, stream in zip(program.inner, streams, strict=True):
            pl.when(j >= stages)(lambda s=stream: plgpu.barrier_wait(s.used.at[slot]))
            plgpu.copy_gmem_to_smem(
                source.at(program.at[0], rows),
                stream.memory.at[slot],
                stream.ready.at[slot],
            )
        return _

    lax.fori_loop(0, program.live, step, None)

    def drain(j, _):  # a program ends with all barriers waited for
        for stream in streams:
            plgpu.barrier_wait(stream.used.at[lax.rem(j, stages)])
        return _

    lax.fori_loop(jnp.maximum(program.live - stages, 0), program.live, drain, None)
