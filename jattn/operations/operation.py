"""A function with hand-written derivatives that JAX can still transform in every way.

An `Operation` is a hashable object with a `fast` way to compute it and a `reference`, the
same function in a form that JAX can differentiate backward. All operations run through
one JAX primitive, whose rules make new operations out of old ones:

    any            jvp       →  Pushforward(operation), linear in the tangents
    Pushforward    transpose →  Pullback(operation), linear in the cotangents
    Pullback       transpose →  Pushforward(operation)
    any            vmap      →  Mapped(operation), a loop over the mapped axis; or an
                                operation of more, where one can take the axis as its own

An operation may bring its own `push` and `pull`; else they are JAX's derivatives, forward
through `fast` and backward through `reference`. So derivatives exist to every order.
"""

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
        names: Where not empty, the names under which its outputs are kept for its
            derivatives, which take them after the arguments.
        elements: About how many elements it holds at once beside its arguments.
    """

    @property
    def outputs(self) -> int:
        """One, unless said otherwise."""
        return 1

    @property
    def linear(self) -> int:
        """None, unless said otherwise."""
        return 0

    @property
    def linear_in(self) -> frozenset[int]:
        """Which of its other arguments it is linear in while the rest stays; none here."""
        return frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """None, unless said otherwise."""
        return ()

    @property
    def elements(self) -> int:
        """None, unless said otherwise."""
        return 0

    @property
    def collective(self) -> bool:
        """Whether its devices send each other arrays: no, unless said otherwise.

        Then it is compiled with types that say over which mesh axes values differ, for
        the transpose of what makes a value differ is a sum over devices.
        """
        return False

    def types(self, *types) -> list:
        """The types of the outputs, as `jax.typeof` gives them, for the arguments'."""
        raise TypeError(f"{type(self).__name__} must define `types`")

    def fast(self, *arrays, spread: bool) -> Any:
        """Computes it; `spread` says that the arrays may lie on several devices."""
        raise TypeError(f"{type(self).__name__} must define `fast`")

    def reference(self, *arrays) -> Any:
        """Computes it in a form that JAX differentiates backward in linear memory."""
        raise TypeError(f"{type(self).__name__} must define `reference`")

    def push(self, active, primals, outputs, tangents, spread: bool):
        """The tangents of the outputs, for tangents of the active arguments."""
        del outputs
        fast = functools.partial(self.fast, spread=spread)
        return jax.jvp(*restrict(fast, active, primals), tuple(tangents))[1]

    def pull(self, active, primals, outputs, cotangents, spread: bool):
        """The cotangents of the active arguments, for cotangents of the outputs."""
        del outputs, spread
        function, chosen = restrict(self.reference, active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def transposed(self) -> "Operation":
        """The operation that gives the cotangents of the linear arguments."""
        raise TypeError(f"{type(self).__name__} is not linear")

    def joined(self, size, mapped, apart) -> Any:
        """Computes all slices of the `mapped` arguments as one call, a `Joined`, or None.

        Args:
            size: How many slices there are.
            mapped: Which arguments have a slice each.
            apart: Which others must be given to each slice apart, for their derivatives
                are asked for slice by slice.
        """
        del size, mapped, apart
        return None

    def on(self, platform: str) -> "Operation":
        """The operation that computes it on a platform: itself, unless said otherwise.

        The platform is "export" where it is CUDA and `jax.export` is to keep the program,
        which it does for few of the calls that a GPU has.
        """
        del platform
        return self

    def __call__(self, *arrays) -> tuple[jax.Array, ...]:
        """Runs it, differentiably."""
        return tuple(primitive.bind(*vary(arrays), operation=self))


def choose(flags, items) -> list:
    """Picks the items whose flag is true."""
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def restrict(function, active, primals):
    """The function of its active arguments alone, and those."""

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
    """The type of an array that lies where one of type `like` does."""
    spec = like.sharding.spec if spec is None else spec
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)


def vary(arrays):
    """The arrays, made to vary over every axis of a `shard_map` that one varies over."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]
