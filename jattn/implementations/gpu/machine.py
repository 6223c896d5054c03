"""The operations of a kernel that differ between the device and the emulator.

The emulator multiplies no matrix that is in registers, and adds to no sum in registers. So
an emulated kernel multiplies by `lax.dot` there. All else is the same: copies, barriers,
memory, and the products of two matrices in shared memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # type checkers may see an older version than `refusal` asks for
TILE = plgpu.Layout.WGMMA
VECTORS = (TILE.reduce(1), TILE.reduce(0))  # a number for each row, and for each column


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device, or its emulator with `interpret`."""

    interpret: Any = None

    def products(self, x, y, meanwhile=lambda: None):
        """Multiplies each row of x by each row of y, both in shared memory.

        `meanwhile` is called when the product has begun.
        """

        def run(sums):
            plgpu.wgmma(sums, x, y.transpose((1, 0)))
            meanwhile()
            return sums[...]

        return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[0]), jnp.float32))

    def add(self, sums, x, y, meanwhile=lambda: None):
        """Computes sums + x y, with x in registers and y in shared memory."""
        if self.interpret:
            more = lax.dot(x, y[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a plain load, unlike wgmma, needs a fence after it
            meanwhile()
            return sums + more

        def run(ref):
            plgpu.wgmma(ref, x, y)
            meanwhile()

        return pl.run_state(run)(plgpu.ACC.init(sums))

    def call(self, kernel, types, arrays):
        """Calls a kernel.

        An emulated one has effects, which an operation with its own derivatives cannot
        have. So it runs in a callback.
        """
        if not self.interpret:
            return kernel(*arrays)
        run = jax.jit(lambda *xs: kernel(*xs))
        return jax.pure_callback(run, types, *arrays, vmap_method="sequential")


def vector(ref, axis: int):
    """Reads a number for each row (axis 0) or for each column (axis 1) of a tile."""
    return plgpu.load(ref, layout=VECTORS[axis], optimized=False)


def tile(ref):
    """Reads a tile from global memory."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def store(ref, value):
    """Writes a tile or a vector to global memory, each thread what it has."""
    plgpu.store(ref, value, optimized=False)


def spread(value, shape, axis: int | None = None):
    """Repeats a number, or the vector of an axis, to a tile."""
    if axis is None:
        return jnp.broadcast_to(value, shape)
    return plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (axis,)), TILE)


def count(shape, axis: int):
    """Gives the number of the row, or of the column, of each pair of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def zeros(shape):
    """Gives sums to begin with: of a tile, or of the rows of one."""
    layout = TILE if len(shape) == 2 else VECTORS[0]
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
