"""Every device collects all keys, and again for each derivative: none of them is kept."""

import dataclasses

import jax
from jax import lax

from jattn.context.spread import Spread
from jattn.operations.derivatives import Pullback

__all__ = ["Gather"]


class Gather(Spread):
    """Attention of this device's queries to all keys, collected first."""

    def fast(self, *arrays, spread):
        """Attends by the operation, with all keys."""
        del spread
        return self._whole()(*self._gathered(self.alike(arrays)))

    def reference(self, *arrays):
        """Attends with all keys, collected again going backward."""
        whole = jax.checkpoint(lambda *xs: self.fast(*xs, spread=False))
        return whole(*self.widened(arrays))

    def pull(self, active, primals, outputs, cotangents, spread):
        """Pulls back by the operation's rule; each device gets the sum for its own keys."""
        del spread
        count = len(primals)
        arrays = self.alike((*primals, *outputs, *cotangents))
        primals, rest = arrays[:count], arrays[count:]
        # Else XLA would find the keys that the forward pass gathered, and keep them.
        primals = lax.optimization_barrier(primals)
        gathered = self.widened(self._gathered(primals))
        parts = iter(Pullback(self._whole(), active)(*gathered, *rest))
        return [
            self._scattered(next(parts), way).astype(x.dtype)
            for x, way, flag in zip(primals, self.ways, active, strict=True)
            if flag
        ]

    def _whole(self):
        """Gives the operation for the keys of all devices."""
        problem = self.operation.problem
        sizes = dataclasses.replace(problem.sizes, S=self.columns * self.devices)
        return dataclasses.replace(
            self.operation, problem=dataclasses.replace(problem, sizes=sizes)
        )

    def _gathered(self, arrays):
        return [
            lax.all_gather(x, self.axis, axis=way, tiled=True)
            if isinstance(way, int)
            else x
            for x, way in zip(arrays, self.ways, strict=True)
        ]

    def _scattered(self, part, way):
        """Gives the cotangent of an argument; of one that travels, its sum over devices."""
        if not isinstance(way, int):
            return part
        part = part.astype(self.wide)
        return lax.psum_scatter(part, self.axis, scatter_dimension=way, tiled=True)
