"""Keys go round: at turn i a device has those of the device i before it.

A rolled loop, so neither the program nor what is kept grows with the devices. The next
keys are sent before those at hand are looked at, so that a transfer has the work of a
turn beside it. Going backward, what earlier turns found for a key is sent after it, in
the wide precision, and in the end it goes home.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jattn.context.spread import Spread
from jattn.context.ways import CUT
from jattn.implementations.sums import Sums, finish, join, nothing
from jattn.operations.derivatives import Pullback
from jattn.operations.operation import choose

__all__ = ["Ring"]


@dataclasses.dataclass(frozen=True)
class Ring(Spread):
    """Attention by a ring of devices.

    Attributes:
        turns: How many turns find anything; None: the last argument says it.
    """

    turns: int | None = None

    def types(self, *types):
        """Asks the operation on each part."""
        return self.operation.types(*self._split(types)[0])

    def fast(self, *arrays, spread):
        """Attends turn by turn."""
        del spread
        arrays, turns = self._split(arrays)
        return self._forward(arrays, turns, self.operation)

    def reference(self, *arrays):
        """Attends in all turns: a number that JAX knows, so that it can differentiate."""
        arrays, _ = self._split(arrays)
        arrays = self.widened(arrays)
        return self._forward(arrays, self.devices, jax.checkpoint(self.operation.__call__))

    def pull(self, active, primals, outputs, cotangents, spread):
        """Adds the cotangents of all parts, given the sums of the whole."""
        del spread
        primals, turns = self._split(primals)
        active = active[: len(primals)]
        count = len(primals)
        arrays = self.alike((*primals, *outputs, *cotangents))
        primals, rest = arrays[:count], arrays[count:]
        pulled, ways = Pullback(self.operation, active), choose(active, self.ways)
        wanted = choose(active, primals)
        sums = self.alike([jnp.zeros(x.shape, self.wide) for x in wanted], primals)

        def turn(i, carry):
            keys, sums = carry
            ahead = self._sent(keys)
            # What earlier turns found goes to where its keys are now.
            sums = [
                self._sent([x])[0] if isinstance(way, int) else x
                for x, way in zip(sums, ways, strict=True)
            ]
            source = self._source(i)
            parts = pulled(*self.widened(self.at(primals, keys, source)), *rest)
            return ahead, self._added(sums, parts, ways, source)

        _, sums = lax.fori_loop(0, turns, turn, (self.travelling(primals), sums))
        sums = self._home(sums, ways, turns)
        return [x.astype(y.dtype) for x, y in zip(sums, wanted, strict=True)]

    def _split(self, arrays):
        """Takes the number of turns apart from the arguments of the parts."""
        if self.turns is None:
            return arrays[:-1], arrays[-1]
        return arrays, self.turns

    def _forward(self, arrays, turns, inner):
        arrays = self.alike(arrays)
        types = self.operation.types(*map(jax.typeof, arrays))
        start = Sums(*self.alike(nothing(Sums(*types)), arrays))

        def turn(i, carry):
            keys, sums = carry
            ahead = self._sent(keys)
            part = inner(*self.at(arrays, keys, self._source(i)))
            return ahead, join(sums, Sums(*part))

        _, sums = lax.fori_loop(0, turns, turn, (self.travelling(arrays), start))
        return tuple(finish(sums))

    def _source(self, i):
        """Says whose keys are at hand in turn i."""
        return (lax.axis_index(self.axis) - i) % self.devices

    def _sent(self, arrays, hops: int = 1):
        """Gets the arrays of the device that is `hops` before this one."""
        pairs = [(i, (i + hops) % self.devices) for i in range(self.devices)]
        return [lax.ppermute(x, self.axis, pairs) for x in arrays]

    def _added(self, sums, parts, ways, source):
        """Adds the cotangents of a part to the sums."""
        first = source * self.columns
        found = []
        for total, part, way in zip(sums, parts, ways, strict=True):
            part = part.astype(total.dtype)
            if way == CUT:
                own = lax.dynamic_slice_in_dim(total, first, self.columns, 3)
                total = lax.dynamic_update_slice_in_dim(total, own + part, first, 3)
            else:
                total = total + part
            found.append(total)
        return found

    def _home(self, sums, ways, turns):
        """Sends the sums that travelled back to where their keys belong."""
        travelled = [x for x, way in zip(sums, ways, strict=True) if isinstance(way, int)]
        if isinstance(turns, int):
            travelled = self._sent(travelled, 1 - turns) if turns > 1 else travelled
        else:  # as many hops back as forth, or the rest of the way round if that is less
            back, on = turns - 1, self.devices - turns + 1
            hop = lambda by: lambda _, xs: self._sent(xs, by)
            travelled = lax.fori_loop(0, jnp.where(back <= on, back, 0), hop(-1), travelled)
            travelled = lax.fori_loop(0, jnp.where(back <= on, 0, on), hop(1), travelled)
        travelled = iter(travelled)
        return [
            next(travelled) if isinstance(way, int) else x
            for x, way in zip(sums, ways, strict=True)
        ]
