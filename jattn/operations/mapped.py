"""An operation for each slice of a mapped axis: a loop, of as much as fits at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.operations.derivatives import Pushforward
from jattn.operations.operation import Operation, choose, retype

# How many elements a vmapped operation may hold at once before it runs as a loop.
BUDGET = 2**21


@dataclasses.dataclass(frozen=True)
class Mapped(Operation):
    """An operation for each slice of the `mapped` arguments along a new first axis.

    Outputs are stacked, or `summed` as the cotangent of an argument not mapped must be.
    """

    operation: Operation
    size: int
    mapped: tuple[bool, ...]
    summed: tuple[bool, ...]

    @property
    def outputs(self):
        """As many as the operation."""
        return self.operation.outputs

    @property
    def linear(self):
        """As the operation."""
        return self.operation.linear

    @property
    def linear_in(self):
        """As the operation."""
        return self.operation.linear_in

    @property
    def names(self):
        """As the operation."""
        return self.operation.names

    @property
    def collective(self):
        """As the operation."""
        return self.operation.collective

    @property
    def chunk(self):
        """How many slices run at once: as many as fit, for small ones gain by it."""
        if not isinstance(self.size, int):
            return 1
        return max(1, min(self.size, BUDGET // max(self.operation.elements, 1)))

    @property
    def elements(self):
        """Those of the slices that run at once."""
        return self.chunk * self.operation.elements

    def types(self, *types):
        """Those of the operation, with the new axis where stacked."""
        inner = [
            retype(x, x.shape[1:], spec=x.sharding.spec[1:]) if mapped else x
            for x, mapped in zip(types, self.mapped, strict=True)
        ]
        return [
            x if summed else retype(x, (self.size, *x.shape), spec=(None, *x.sharding.spec))
            for x, summed in zip(self.operation.types(*inner), self.summed, strict=True)
        ]

    def on(self, platform):
        """That of the operation for the platform, mapped."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def fast(self, *arrays, spread):
        """Chunk by chunk; all at once where a loop would cut an axis of many devices."""
        function = functools.partial(self.operation.fast, spread=spread)
        return self._run(function, arrays, self.size if spread else self.chunk)

    def reference(self, *arrays):
        """Chunk by chunk."""
        return self._run(jax.checkpoint(self.operation.reference), arrays, self.chunk)

    def pushed(self, active):
        """The tangents, mapped likewise."""
        kept = (True,) * len(self.names)
        mapped = (*self.mapped, *kept, *choose(active, self.mapped))
        return Mapped(pushed(self.operation, active), self.size, mapped, self.summed)

    def transposed(self):
        """The transpose, mapped where this one stacks and summed where it broadcasts."""
        fixed = len(self.mapped) - self.linear
        mapped = (*self.mapped[:fixed], *(not x for x in self.summed))
        summed = tuple(not x for x in self.mapped[fixed:])
        return Mapped(self.operation.transposed(), self.size, mapped, summed)

    def _run(self, function, arrays, chunk):
        axes = [0 if mapped else None for mapped in self.mapped]

        def at_once(size, *arrays):
            if isinstance(size, int) and size == 1:  # kernels are not to be mapped
                return self._one(function, arrays)
            outputs = jax.vmap(function, axes, axis_size=size)(*arrays)
            return [
                jnp.sum(x, axis=0, dtype=x.dtype) if summed else x
                for x, summed in zip(outputs, self.summed, strict=True)
            ]

        if chunk is self.size or chunk == self.size:
            return at_once(self.size, *arrays)
        return self._loop(at_once, arrays, chunk)

    def _one(self, function, arrays):
        pairs = zip(arrays, self.mapped, strict=True)
        outputs = function(*(x[0] if mapped else x for x, mapped in pairs))
        pairs = zip(outputs, self.summed, strict=True)
        return [x if summed else x[None] for x, summed in pairs]

    def _loop(self, at_once, arrays, chunk):
        count = self.size // chunk
        cut = lambda part: [
            part(x) if mapped else x for x, mapped in zip(arrays, self.mapped, strict=True)
        ]
        head = lambda x: x[: count * chunk].reshape(count, chunk, *x.shape[1:])
        types = self.types(*map(jax.typeof, arrays))
        sums = [
            jnp.zeros(x.shape, x.dtype)
            for x, summed in zip(types, self.summed, strict=True)
            if summed
        ]

        def step(sums, scanned):
            scanned = iter(scanned)
            given = [
                next(scanned) if mapped else x
                for x, mapped in zip(arrays, self.mapped, strict=True)
            ]
            outputs = at_once(chunk, *given)
            sums = [
                total + x
                for total, x in zip(sums, choose(self.summed, outputs), strict=True)
            ]
            return sums, choose([not x for x in self.summed], outputs)

        xs = choose(self.mapped, cut(head))
        sums, stacked = jax.lax.scan(step, sums, xs)
        stacked = [x.reshape(count * chunk, *x.shape[2:]) for x in stacked]
        sums, stacked = iter(sums), iter(stacked)
        outputs = [next(sums) if summed else next(stacked) for summed in self.summed]
        rest = 0 if chunk == 1 else self.size % chunk
        if not rest:
            return outputs
        tail = at_once(rest, *cut(lambda x: x[count * chunk :]))
        return [
            x + y if summed else jnp.concatenate([x, y])
            for x, y, summed in zip(outputs, tail, self.summed, strict=True)
        ]


def pushed(operation: Operation, active) -> Operation:
    """The operation that gives the tangents of another one."""
    if isinstance(operation, Mapped):
        return operation.pushed(active)
    return Pushforward(operation, active)


@custom_vmap
def _in_any_slice(predicate):
    return predicate


@_in_any_slice.def_vmap
def _(size, mapped, predicate):
    del size, mapped
    return _in_any_slice(jnp.any(predicate, axis=0)), False


def cond_any(predicate, mend, otherwise, *operands):
    """`jax.lax.cond` that runs one branch in a `vmap` too: `mend`, if any slice asks.

    So `mend` must be right where `otherwise` is. A condition that differs from slice to
    slice makes JAX run both branches for all of them.
    """
    return jax.lax.cond(_in_any_slice(predicate), mend, otherwise, *operands)
