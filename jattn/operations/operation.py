"""A function with hand-written derivatives that JAX can still transform in every way.

An `Operation` is a hashable object with a `fast` way to compute it and a `reference`, the
same function in a form that JAX can differentiate backward. All operations run through
one JAX primitive, whose rules make new operations out of old ones:

    any            jvp       →  Pushforward(operation), linear in the tangents
    Pushforward    transpose →  Pullback(operation), linear in the cotangents
    Pullback       transpose →  Pushforward(operation)
    any            vmap      →  Mapped(operation), a loop over the mapped axis; or one
                                larger operation, where the mapped axis can join its own

An operation may define its own `push` and `pull`. By default they are JAX's derivatives,
forward through `fast` and backward through `reference`. So derivatives exist to every
order.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.extend.core import Primitive

primitive = Primitive("jattn")
primitive.multiple_results = True


class Operation:
    """A function of arrays to a tuple of floating arrays; subclasses are hashable.

    Attributes:
        outputs: How many arrays it returns.
        linear: How many of its last arguments it is linear in.
        names: Names for its outputs, as `checkpoint_name` takes them. If there are any,
            its derivatives take the outputs, after the arguments.
        elements: About how many elements it holds at once besides its arguments.
    """

    @property
    def outputs(self) -> int:
        """Gives the number of outputs; 1 by default."""
        return 1

    @property
    def linear(self) -> int:
        """Gives how many of the last arguments it is linear in; 0 by default."""
        return 0

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the other arguments that it is linear in, if all others stay fixed.

        There are none by default.
        """
        return frozenset()

    @property
    def constant(self) -> frozenset[int]:
        """Gives the outputs that do not depend on the arguments `linear_in`.

        There are none by default.
        """
        return frozenset()

    @property
    def may_be_wide(self) -> frozenset[int]:
        """Gives the arguments that may come in a wider dtype than that of their numbers.

        Then their cotangents are as wide, for who adds them up. There are none by default.
        """
        return frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Gives the names of its outputs; no names by default."""
        return ()

    @property
    def elements(self) -> int:
        """Gives about how many elements it holds at once; 0 by default."""
        return 0

    @property
    def collective(self) -> bool:
        """Says whether its devices send each other arrays: no, unless said otherwise.

        Then it is compiled with types that say over which mesh axes values differ, for
        the transpose of what makes a value differ is a sum over devices.
        """
        return False

    def types(self, *types) -> list:
        """Gives the outputs' types, as `jax.typeof` does, from the arguments' types."""
        raise TypeError(f"{type(self).__name__} must define `types`")

    def fast(self, *arrays, spread: bool) -> Any:
        """Computes the outputs; with `spread`, the arrays may lie on several devices."""
        raise TypeError(f"{type(self).__name__} must define `fast`")

    def reference(self, *arrays) -> Any:
        """Computes the outputs in a form that JAX can differentiate backward.

        That backward pass takes linear memory.
        """
        raise TypeError(f"{type(self).__name__} must define `reference`")

    def push(self, active, primals, outputs, tangents, spread: bool):
        """Computes tangents of the outputs from tangents of the active arguments."""
        del outputs
        fast = functools.partial(self.fast, spread=spread)
        return jax.jvp(*restrict(fast, active, primals), tuple(tangents))[1]

    def pull(self, active, primals, outputs, cotangents, spread: bool):
        """Computes cotangents of the active arguments from cotangents of the outputs."""
        # JAX differentiates `reference` anew, so it needs no outputs of the forward pass.
        del outputs, spread
        function, chosen = restrict(self.reference, active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def transposed(self) -> "Operation":
        """Gives the operation that computes the cotangents of the linear arguments."""
        raise TypeError(f"{type(self).__name__} is not linear")

    def joined(self, size, mapped, apart) -> Any:
        """Gives a `Joined` that computes all slices in one call; None where it cannot.

        Args:
            size: How many slices there are.
            mapped: Which arguments have one slice for each.
            apart: Which other arguments each slice needs its own copy of, because each
                slice has its own derivatives of them.
        """
        del size, mapped, apart
        return None

    def on(self, platform: str) -> "Operation":
        """Gives the operation that computes the same on a platform; itself by default.

        The platform is "export" when lowering for CUDA under `jax.export`, which refuses
        custom calls without a stability promise, cuDNN's among them.
        """
        del platform
        return self

    def __call__(self, *arrays) -> tuple[jax.Array, ...]:
        """Runs the operation; JAX can differentiate the call."""
        return tuple(primitive.bind(*vary(arrays), operation=self))


@dataclasses.dataclass(frozen=True)
class Around(Operation):
    """An operation that has the outputs of another one, which it holds as `operation`."""

    operation: Any

    @property
    def outputs(self):
        """Asks the operation inside."""
        return self.operation.outputs

    @property
    def linear(self):
        """Asks the operation inside."""
        return self.operation.linear

    @property
    def linear_in(self):
        """Asks the operation inside."""
        return self.operation.linear_in

    @property
    def constant(self):
        """Asks the operation inside."""
        return self.operation.constant

    @property
    def may_be_wide(self):
        """Asks the operation inside."""
        return self.operation.may_be_wide

    @property
    def names(self):
        """Asks the operation inside."""
        return self.operation.names

    @property
    def collective(self):
        """Asks the operation inside."""
        return self.operation.collective


def choose(flags, items) -> list:
    """Gives the items whose flag is true."""
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def restrict(function, active, primals):
    """Gives a function of the active arguments alone, and these arguments."""

    def restricted(*chosen):
        chosen = iter(chosen)
        return tuple(
            function(
                *(
                    next(chosen) if flag else x
                    for flag, x in zip(active, primals, strict=True)
                )
            )
        )

    return restricted, tuple(choose(active, primals))


def retype(like, shape, dtype=None, spec=None):
    """Gives the type of an array that lies on the same devices as one of type `like`."""
    spec = like.sharding.spec if spec is None else spec
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)


def vary(arrays):
    """Makes all arrays vary over each `shard_map` axis that any of them varies over.

    JAX refuses to combine arrays in one equation that vary over different axes.
    """
    # Outside of `shard_map` no array varies, and nothing changes.
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]
