"""What a kernel asks of the machine, whichever way it multiplies.

A tile of logits lies in the registers of 128 threads in the layout in which both `wgmma`
and `mma` leave a product. So all that is elementwise is the same on all machines.

Their own ways to copy and to multiply are in `wgmma` and `mma`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # type checkers may see an older version than `refusal` asks for
TILE = plgpu.Layout.WGMMA
VECTORS = (TILE.reduce(1), TILE.reduce(0))  # a number for each row, and for each column


@dataclasses.dataclass(frozen=True)
class Machine(abc.ABC):
    """The device, or its emulator with `interpret`.

    The emulator multiplies no matrix that is in registers, and adds to no sum in registers.
    So an emulated kernel multiplies by `lax.dot` there.
    """

    interpret: Any = None

    @property
    @abc.abstractmethod
    def threads(self) -> int:
        """Says how many groups of 128 threads a program has."""

    @abc.abstractmethod
    def memory(self, call: Any, arguments: Any, own: int) -> tuple:
        """Describes the shared memory and the barriers of a program."""

    @abc.abstractmethod
    def run(self, program: Any, kernel: Callable, outputs, memory):
        """Runs a program: copies what it reads, and lets its groups compute."""

    @abc.abstractmethod
    def products(self, x, y, meanwhile: Callable = lambda: None) -> jax.Array:
        """Multiplies each row of x by each row of y, both in shared memory.

        `meanwhile` is called when the product has begun.
        """

    @abc.abstractmethod
    def add(self, sums, x, y) -> jax.Array:
        """Computes sums + x y, with x in registers and y in shared memory.

        x is rounded to the dtype of y.
        """

    def emulated(self, x, y):
        """Computes x y in the emulator; x is rounded to the dtype of y."""
        x = x.astype(y.dtype)
        product = lax.dot(x, y, preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a plain load, unlike wgmma, needs a fence after it
        return product

    def call(self, kernel, types, arrays):
        """Calls a kernel.

        An emulated one has effects, which an operation with its own derivatives cannot
        have. So it runs in a callback.
        """
        if not self.interpret:
            return kernel(*arrays)
        run = jax.jit(lambda *xs: kernel(*xs))
        return jax.pure_callback(run, types, *arrays, vmap_method="sequential")


def tiled(shape, dtype):
    """Describes shared memory as the products read it: swizzled tiles of 8 rows."""
    swizzle = plgpu.find_swizzle(shape[-1] * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def vector(ref, axis: int):
    """Reads a number for each row (axis 0) or for each column (axis 1) of a tile."""
    return plgpu.load(ref, layout=VECTORS[axis], optimized=False)


def tile(ref):
    """Reads a tile from global memory."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def store(ref, value):
    """Writes a tile or a vector to global memory, each thread what it has."""
    ref[...] = value


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
