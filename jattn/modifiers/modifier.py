"""What a modifier is, and modifiers made of functions or of other modifiers by `>>`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.arrays.checks import check_arguments, check_callable
from jattn.arrays.shapes import Sizes
from jattn.pytree import as_written, pytree


class Modifier:
    """A map on logits; subclasses say which."""

    __array_ufunc__ = None  # so that `array >> modifier` calls `__rrshift__` here

    def aligned(self, sizes: Sizes) -> Any:
        """Gives a pytree of arrays that broadcast to BNTS, read by row and column."""
        del sizes
        return ()

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Gives the new logit of this query and key, a scalar."""
        raise TypeError(f"{type(self).__name__} must define `modify`")

    def __rshift__(self, other) -> "Modifier":
        return Compose(self, as_modifier(other))

    def __rrshift__(self, other) -> "Modifier":
        return Compose(as_modifier(other), self)

    def __repr__(self) -> str:
        """Writes the modifier as in Python code, `SoftCap(50.0) >> ALiBi()`."""
        return as_written(self)


def as_modifier(modifier, where: str = "modifiers") -> Modifier:
    """Makes a modifier from a modifier or a function of (logit, b, n, t, s)."""
    if isinstance(modifier, Modifier):
        return modifier
    if isinstance(modifier, type):
        raise ValueError(
            f"{where}: `modifier` must be a modifier, got the class {modifier.__name__}; "
            f"call it."
        )
    if hasattr(modifier, "allows"):
        raise ValueError(
            f"{where}: `modifier` must change a logit, got the mask {modifier!r}; give it "
            f"as `mask`."
        )
    if callable(modifier):
        check_arguments(where, "modifier", modifier, "logit, b, n, t, s")
        return Pointwise(modifier)
    if isinstance(modifier, tuple | list):
        raise ValueError(
            f"{where}: `modifier` must be one modifier, got a {type(modifier).__name__}; "
            f"compose modifiers by `>>`."
        )
    raise ValueError(
        f"{where}: `modifier` must be a function (logit, b, n, t, s) → logit or one of "
        f"jattn.modifiers, got {type(modifier).__name__}; an array belongs in `bias`."
    )


@pytree(static=("function",))
class Pointwise(Modifier):
    """A modifier from any function (logit, b, n, t, s) → logit, written for scalars."""

    function: Callable

    def __post_init__(self):
        form, cure = "(logit, b, n, t, s) → logit", "an array is a `modifiers.Bias`"
        check_callable("modifiers.Pointwise", self.function, form, cure)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Calls the function."""
        return self.function(logit, b, n, t, s)


@pytree("first", "second")
class Compose(Modifier):
    """A modifier that applies two, one after the other: `first >> second`."""

    first: Modifier
    second: Modifier

    def aligned(self, sizes) -> Any:
        """Gives the arrays of each modifier."""
        return self.first.aligned(sizes), self.second.aligned(sizes)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Applies the first modifier, then the second one."""
        first, second = elements
        # The first modifier may change the dtype; the second gets the logit's again.
        first = jnp.asarray(self.first.modify(logit, b, n, t, s, first))
        return self.second.modify(first.astype(logit.dtype), b, n, t, s, second)

    def __repr__(self) -> str:
        second = f"({self.second!r})" if isinstance(self.second, Compose) else self.second
        return f"{self.first!r} >> {second}"
