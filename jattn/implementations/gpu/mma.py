"""Ampere and Ada: products by `mma`, and copies that each thread begins itself.

Two groups of 128 threads run for each program of the grid, and both compute. There is no
third one that copies, because these devices cannot give its registers to the others. While
the groups compute with one block, the next one is copied into the other stage: one group
copies the first input of the inner side, the other group the second one.

    met     both groups have read the last block, and what they copied of this one is here

Compiled for 8.0, 8.6 and 8.9 and emulated, never run on one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu

from jattn.implementations.gpu.layout import GROUPS, ROWS
from jattn.implementations.gpu.machine import TILE, Machine, plgpu, tiled, zeros

_CHUNK = 64  # numbers of a head that are multiplied at a time: a swizzled tile has so many
_DEPTH = 16  # rows of y that one `mma` adds


class Stream(NamedTuple):
    """Blocks of an input in shared memory; `begin` waits for them, and nothing else."""

    memory: Any

    def wait(self, slot):
        """Does nothing: the block has arrived."""

    def release(self, slot):
        """Does nothing: the groups meet before the stage is written again."""


@dataclasses.dataclass(frozen=True)
class Mma(Machine):
    """An Ampere or Ada GPU."""

    threads = GROUPS

    def memory(self, call, arguments, own):
        """Describes the shared memory and the barriers of a program."""
        stages, dtype = call.plan.stages, call.problem.dtype
        sizes = [x.shape[3] for x in arguments.inputs]
        owned = [tiled((GROUPS, ROWS, size), dtype) for size in sizes[:own]]
        blocks = [(stages, call.plan.inner, size) for size in sizes[own:]]
        copied = [Stream(tiled(block, dtype)) for block in blocks]
        met = plgpu.Barrier(num_arrivals=GROUPS)
        if not self.interpret:
            return owned, copied, met, None, None
        ready = plgpu.Barrier(num_barriers=GROUPS, num_arrivals=own)
        return owned, copied, met, ready, plgpu.Barrier(num_barriers=GROUPS)

    def run(self, program, kernel, outputs, memory):
        """Runs a program: each group copies and computes."""
        owned, streams, met, ready, arrived = memory
        group, stages = program.group, np.int32(program.call.plan.stages)
        for source, ref in zip(program.own, owned, strict=True):
            self._copy(source.at(program.at[0], program.rows), ref.at[group], ready, group)

        def start(j):
            rows, slot = program.inner_rows(j), lax.rem(j, stages)
            pairs = zip(program.inner, streams, strict=True)
            for number, (source, stream) in enumerate(pairs):
                block = source.at(program.at[0], rows), stream.memory.at[slot]
                pl.when(group == number)(lambda x=block: self._copy(*x, arrived, group))

        def begin(j):
            self._wait(arrived, group)
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            pl.when(j + 1 < program.live)(lambda: start(j + 1))

        pl.when(program.live > 0)(lambda: start(np.int32(0)))
        self._wait(ready, group)
        own = tuple(ref.at[group] for ref in owned)
        kernel(program.context(own, streams, begin=begin))(outputs)

    def _copy(self, source, target, barriers, group):
        """Begins a copy; the emulator has only copies that arrive at a barrier."""
        if self.interpret:
            plgpu.copy_gmem_to_smem(source, target, barriers.at[group])
        else:
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # lengths are padded
            plgpu.copy_gmem_to_smem(source, target, oob_mode=inside)

    def _wait(self, barriers, group):
        """Waits until what this group copies is here."""
        if self.interpret:
            plgpu.barrier_wait(barriers.at[group])
        else:
            plgpu.wait_gmem_to_smem(0)

    def products(self, x, y, meanwhile: Callable = lambda: None):
        """Multiplies each row of x by each row of y, both in shared memory."""
        meanwhile()
        if self.interpret:
            return self.emulated(x[...], y[...].T)
        left, right = _operands(x.dtype)
        sums = zeros((x.shape[0], y.shape[0]))
        for first in range(0, x.shape[1], _CHUNK):
            some = pl.ds(first, _CHUNK)
            these = plgpu.load(x.at[:, some], layout=left)
            those = plgpu.load(y.at[:, some].transpose((1, 0)), layout=right)
            sums = plgpu.mma(sums, these, those)
        return sums

    def add(self, sums, x, y):
        """Computes sums + x y, with x in registers and y in shared memory."""
        if self.interpret:
            return sums + self.emulated(x, y[...])
        _, right = _operands(y.dtype)
        for number, part in enumerate(_left(x, y.dtype)):
            some = plgpu.load(y.at[pl.ds(number * _DEPTH, _DEPTH)], layout=right)
            sums = plgpu.mma(sums, part, some)
        return sums


def _operands(dtype):
    """Gives the layouts of the two matrices that `mma` multiplies."""
    return plgpu.Layout.MMA_LHS(dtype), plgpu.Layout.MMA_RHS(dtype)


def _left(x, dtype):
    """Makes the operands of `mma` from a tile: of each 16 columns one.

    A thread has the same numbers of a tile in both layouts. So no number moves: each is
    rounded, and its register is named in another way.
    """
    left, _ = _operands(dtype)
    shape = x.shape[0], _DEPTH
    count = x.shape[1] // _DEPTH
    part = plgpu.ShapeDtypeStruct(shape, dtype, layout=left)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(part,) * count)
    def renamed(_, x):
        layout = left.to_mgpu()
        narrow = x.astype(mgpu.utils.dtype_to_ir_type(dtype))
        return tuple(
            mgpu.FragmentedArray(
                _registers=registers.reshape(layout.registers_shape(shape)),
                _layout=layout,
                _is_signed=None,
            )
            for registers in np.split(narrow.registers, count, axis=1)
        )

    return renamed(x)
