"""The tangents of an operation, and its cotangents: operations again."""

import dataclasses
import operator

import jax

from jattn.operations.join import Joined
from jattn.operations.operation import Operation, choose, restrict


@dataclasses.dataclass(frozen=True)
class _Derivative(Operation):
    """Takes the arguments of `operation`, its outputs where kept, and a linear rest."""

    operation: Operation
    active: tuple[bool, ...]

    @property
    def elements(self):
        """More than the operation, as there is more to hold."""
        return 2 * self.operation.elements

    @property
    def collective(self):
        """As the operation."""
        return self.operation.collective

    def on(self, platform):
        """That of the operation for the platform."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def split(self, arrays):
        """The arguments, the outputs, and the rest."""
        count = len(self.active)
        kept = count + len(self.operation.names)
        return arrays[:count], arrays[count:kept], arrays[kept:]

    def join(self, size, mapped, apart):
        """The operation joined, its active arguments apart where `apart` says so too."""
        apart = [x or y for x, y in zip(apart, self.split(mapped)[0], strict=True)]
        joined = self.operation.joined(size, self.split(mapped)[0], tuple(apart))
        if joined is None:
            return None
        kept = joined.outputs if self.operation.names else ()
        return joined, (*joined.arguments, *kept), choose(self.active, joined.arguments)


@dataclasses.dataclass(frozen=True)
class Pushforward(_Derivative):
    """The tangents of an operation, from those of its active arguments."""

    @property
    def outputs(self):
        """One for each output."""
        return self.operation.outputs

    @property
    def linear(self):
        """The tangents."""
        return sum(self.active)

    def types(self, *types):
        """Those of the outputs."""
        return self.operation.types(*self.split(types)[0])

    def fast(self, *arrays, spread):
        """By the operation's own rule."""
        return self.operation.push(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """By JAX's."""
        primals, _, tangents = self.split(arrays)
        restricted = restrict(self.operation.reference, self.active, primals)
        return jax.jvp(*restricted, tuple(tangents))[1]

    def transposed(self):
        """The pullback."""
        return Pullback(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Its arguments apart wherever their tangents are."""
        primals, _, tangents = self.split(tuple(map(operator.or_, mapped, apart)))
        tangents = iter(tangents)
        tangents = [flag and next(tangents) for flag in self.active]
        found = self.join(size, mapped, tuple(map(operator.or_, primals, tangents)))
        if found is None:
            return None
        inner, arguments, active = found
        operation = Pushforward(inner.operation, self.active)
        return Joined(operation, (*arguments, *active), inner.outputs)


@dataclasses.dataclass(frozen=True)
class Pullback(_Derivative):
    """The cotangents of an operation's active arguments, from those of its outputs."""

    @property
    def outputs(self):
        """One for each active argument."""
        return sum(self.active)

    @property
    def linear(self):
        """The cotangents."""
        return self.operation.outputs

    def types(self, *types):
        """Those of the active arguments."""
        return choose(self.active, types[: len(self.active)])

    def fast(self, *arrays, spread):
        """By the operation's own rule."""
        return self.operation.pull(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """By JAX's."""
        primals, _, cotangents = self.split(arrays)
        function, chosen = restrict(self.operation.reference, self.active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def transposed(self):
        """The pushforward."""
        return Pushforward(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Its active arguments apart, for each slice has a cotangent of its own."""
        apart = map(operator.or_, self.split(apart)[0], self.active)
        found = self.join(size, mapped, tuple(apart))
        if found is None:
            return None
        inner, arguments, active = found
        operation = Pullback(inner.operation, self.active)
        return Joined(operation, (*arguments, *inner.outputs), tuple(active))
