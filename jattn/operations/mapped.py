"""An operation for each slice of a mapped axis: a loop over chunks that fit at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.arrays.shapes import wide_dtype, widened
from jattn.operations.derivatives import Pullback, Pushforward
from jattn.operations.operation import Around, Operation, choose, retype

# How many elements a vmapped operation may hold at once before it runs as a loop: 8 MiB in
# float32.
BUDGET = 2**21


@dataclasses.dataclass(frozen=True)
class Mapped(Around):
    """An operation for each slice of the `mapped` arguments along a new first axis.

    Outputs are stacked along a new first axis, or summed over the slices where `summed`
    says so: the cotangent of an argument that is not mapped is such a sum.
    """

    size: int
    mapped: tuple[bool, ...]
    summed: tuple[bool, ...]

    @property
    def chunk(self):
        """Gives how many slices run at once: as many as fit in BUDGET, at least one."""
        if not isinstance(self.size, int):
            return 1
        return max(1, min(self.size, BUDGET // max(self.operation.elements, 1)))

    @property
    def elements(self):
        """Gives the number of elements of the slices that run at once."""
        return self.chunk * self.operation.elements

    def types(self, *types):
        """Gives the types of the operation's outputs; stacked ones have the new axis."""
        # The operation sees mapped arguments without their first axis.
        inner = [
            retype(x, x.shape[1:], spec=x.sharding.spec[1:]) if mapped else x
            for x, mapped in zip(types, self.mapped, strict=True)
        ]
        return [
            x if summed else retype(x, (self.size, *x.shape), spec=(None, *x.sharding.spec))
            for x, summed in zip(self.operation.types(*inner), self.summed, strict=True)
        ]

    def on(self, platform):
        """Maps the operation for the platform."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def fast(self, *arrays, spread):
        """Computes chunk by chunk; all at once where arrays lie on several devices.

        There, a loop would slice an axis that may be divided among the devices.
        """
        function = functools.partial(self.operation.fast, spread=spread)
        return self._run(function, arrays, self.size if spread else self.chunk)

    def reference(self, *arrays):
        """Computes the reference chunk by chunk."""
        return self._run(jax.checkpoint(self.operation.reference), arrays, self.chunk)

    def pushed(self, active):
        """Maps the operation that gives the tangents."""
        kept = (True,) * len(self.names)
        mapped = (*self.mapped, *kept, *choose(active, self.mapped))
        return Mapped(pushed(self.operation, active), self.size, mapped, self.summed)

    def transposed(self):
        """Maps the transpose: stacked outputs become mapped arguments.

        Arguments that are not mapped are broadcast to all slices; their cotangents are
        summed.
        """
        fixed = len(self.mapped) - self.linear
        mapped = (*self.mapped[:fixed], *(not x for x in self.summed))
        summed = tuple(not x for x in self.mapped[fixed:])
        return Mapped(self.operation.transposed(), self.size, mapped, summed)

    def _run(self, function, arrays, chunk):
        types = self.types(*map(jax.typeof, arrays))
        outputs = self._unrounded(function, self._widened(arrays), chunk)
        return [x.astype(like.dtype) for x, like in zip(outputs, types, strict=True)]

    def _widened(self, arrays):
        """Gives the arguments so that cotangents that are summed are not rounded yet."""
        inner = self.operation
        while isinstance(inner, Mapped):
            inner = inner.operation
        if not isinstance(inner, Pullback):
            return arrays
        shared = {i for i, flag in enumerate(inner.active) if flag and not self.mapped[i]}
        shared &= inner.operation.may_be_wide
        return [widened(x) if i in shared else x for i, x in enumerate(arrays)]

    def _unrounded(self, function, arrays, chunk):
        """Computes the outputs; sums over slices are left in float32 at least."""
        axes = [0 if mapped else None for mapped in self.mapped]

        def at_once(size, *arrays):
            # A single slice runs without `vmap`, which kernels may not support.
            if isinstance(size, int) and size == 1:
                return self._one(function, arrays)
            outputs = jax.vmap(function, axes, axis_size=size)(*arrays)
            return [
                jnp.sum(x, axis=0, dtype=wide_dtype(x.dtype)) if summed else x
                for x, summed in zip(outputs, self.summed, strict=True)
            ]

        if chunk is self.size or chunk == self.size:
            return at_once(self.size, *arrays)
        return self._loop(at_once, arrays, chunk)

    def _one(self, function, arrays):
        pairs = zip(arrays, self.mapped, strict=True)
        outputs = function(*(x[0] if mapped else x for x, mapped in pairs))
        pairs = zip(outputs, self.summed, strict=True)
        return [x.astype(wide_dtype(x.dtype)) if flag else x[None] for x, flag in pairs]

    def _each(self, function, arrays):
        """Applies a function to the mapped arguments."""
        pairs = zip(arrays, self.mapped, strict=True)
        return [function(x) if mapped else x for x, mapped in pairs]

    def _loop(self, at_once, arrays, chunk):
        count = self.size // chunk
        # Whole chunks run in a scan; the rest of the slices, if any, runs after it.
        head = lambda x: x[: count * chunk].reshape(count, chunk, *x.shape[1:])
        types = self.types(*map(jax.typeof, arrays))
        sums = [
            jnp.zeros(x.shape, wide_dtype(x.dtype))
            for x, summed in zip(types, self.summed, strict=True)
            if summed
        ]

        # Summed outputs are carried, stacked ones are the outputs of the scan.
        def step(sums, scanned):
            scanned = iter(scanned)
            outputs = at_once(chunk, *self._each(lambda _: next(scanned), arrays))
            sums = [
                total + x
                for total, x in zip(sums, choose(self.summed, outputs), strict=True)
            ]
            return sums, choose([not x for x in self.summed], outputs)

        xs = choose(self.mapped, self._each(head, arrays))
        sums, stacked = jax.lax.scan(step, sums, xs)
        stacked = [x.reshape(count * chunk, *x.shape[2:]) for x in stacked]
        sums, stacked = iter(sums), iter(stacked)
        outputs = [next(sums) if summed else next(stacked) for summed in self.summed]
        # Chunks of one leave no rest, also of a symbolic size.
        rest = 0 if chunk == 1 else self.size % chunk
        if not rest:
            return outputs
        tail = at_once(rest, *self._each(lambda x: x[count * chunk :], arrays))
        return [
            x + y if summed else jnp.concatenate([x, y])
            for x, y, summed in zip(outputs, tail, self.summed, strict=True)
        ]


def pushed(operation: Operation, active) -> Operation:
    """Gives the operation that computes the tangents of another one."""
    if isinstance(operation, Mapped):
        return operation.pushed(active)
    return Pushforward(operation, active)


@custom_vmap
def in_any_slice(predicate):
    """Gives Booleans; inside `vmap`, whether any slice has one, the same for all."""
    return predicate


@in_any_slice.def_vmap
def _(size, mapped, predicate):
    del size, mapped
    return in_any_slice(jnp.any(predicate, axis=0)), False


def cond_any(predicate, mend, otherwise, *operands):
    """Runs `jax.lax.cond`, also inside `vmap`, with one branch: `mend` if any slice asks.

    So `mend` must be right for every slice. With a plain `cond`, a condition that differs
    from slice to slice makes JAX run both branches for all slices.
    """
    return jax.lax.cond(in_any_slice(predicate), mend, otherwise, *operands)
