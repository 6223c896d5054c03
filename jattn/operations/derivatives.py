"""The tangents and the cotangents of an operation, computed by operations.

For an operation f with the active arguments x, the arguments with derivatives:

    Pushforward    ẏ = J ẋ      J = ∂f/∂x, ẋ tangents of x, ẏ tangents of the outputs
    Pullback       x̄ = Jᵀ ȳ     ȳ cotangents of the outputs, x̄ cotangents of x
"""

import dataclasses
import operator

import jax

from jattn.operations.join import Joined
from jattn.operations.operation import Operation, choose, restrict


@dataclasses.dataclass(frozen=True)
class _Derivative(Operation):
    """A function linear in its last arguments, tangents or cotangents of `operation`.

    Before these it takes the arguments of `operation`, then its outputs if it has names
    for them. `active` says which arguments of `operation` have derivatives.
    """

    operation: Operation
    active: tuple[bool, ...]

    @property
    def elements(self):
        """Gives twice as many as `operation`: its values and their derivatives."""
        return 2 * self.operation.elements

    @property
    def collective(self):
        """Asks the operation."""
        return self.operation.collective

    def on(self, platform):
        """Gives the derivative of the operation for the platform."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def split(self, arrays):
        """Splits arrays into the arguments, the outputs and the linear arguments."""
        count = len(self.active)
        kept = count + len(self.operation.names)
        return arrays[:count], arrays[count:kept], arrays[kept:]

    def join(self, size, mapped, apart):
        """Joins the operation; gives it, how its arrays join, and how the active ones do.

        Arguments that are mapped, or that `apart` names, are given to each slice apart.
        """
        apart = [x or y for x, y in zip(apart, self.split(mapped)[0], strict=True)]
        joined = self.operation.joined(size, self.split(mapped)[0], tuple(apart))
        if joined is None:
            return None
        # The operation's outputs are arguments here: they join as its outputs do.
        kept = joined.outputs if self.operation.names else ()
        return joined, (*joined.arguments, *kept), choose(self.active, joined.arguments)


@dataclasses.dataclass(frozen=True)
class Pushforward(_Derivative):
    """The tangents of an operation's outputs, from tangents of its active arguments."""

    @property
    def outputs(self):
        """Gives the number of outputs: one tangent for each output of the operation."""
        return self.operation.outputs

    @property
    def linear(self):
        """Gives the number of tangents, one for each active argument."""
        return sum(self.active)

    def types(self, *types):
        """Gives the types of the operation's outputs."""
        return self.operation.types(*self.split(types)[0])

    def fast(self, *arrays, spread):
        """Computes the tangents by the operation's own rule."""
        return self.operation.push(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """Computes the tangents by JAX's rule."""
        primals, _, tangents = self.split(arrays)
        restricted = restrict(self.operation.reference, self.active, primals)
        return jax.jvp(*restricted, tuple(tangents))[1]

    def transposed(self):
        """Gives the pullback."""
        return Pullback(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Joins all slices; an argument is apart wherever its tangent is."""
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
    """The cotangents of an operation's active arguments, from cotangents of its outputs."""

    @property
    def outputs(self):
        """Gives the number of active arguments: one cotangent for each."""
        return sum(self.active)

    @property
    def linear(self):
        """Gives the number of cotangents, one for each output of the operation."""
        return self.operation.outputs

    def types(self, *types):
        """Gives the types of the active arguments."""
        return choose(self.active, types[: len(self.active)])

    def fast(self, *arrays, spread):
        """Computes the cotangents by the operation's own rule."""
        return self.operation.pull(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """Computes the cotangents by JAX's rule."""
        primals, _, cotangents = self.split(arrays)
        function, chosen = restrict(self.operation.reference, self.active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def transposed(self):
        """Gives the pushforward."""
        return Pushforward(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Joins all slices; active arguments are apart: each slice has its cotangent."""
        apart = map(operator.or_, self.split(apart)[0], self.active)
        found = self.join(size, mapped, tuple(apart))
        if found is None:
            return None
        inner, arguments, active = found
        # Cotangents join as the outputs do, and come out as the active arguments.
        operation = Pullback(inner.operation, self.active)
        return Joined(operation, (*arguments, *inner.outputs), tuple(active))
