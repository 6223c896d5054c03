"""What a mask is, and masks made of functions, arrays, or other masks by `&`, `|`, `~`."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jattn.arrays.checks import align, check_arguments, check_array, check_callable
from jattn.arrays.shapes import Sizes
from jattn.pytree import as_written, pytree


class Mask:
    """A predicate on pairs of a query and a key; subclasses say which pairs count."""

    __array_ufunc__ = None  # so that `array & mask` calls `__rand__` of the mask

    def aligned(self, sizes: Sizes) -> Any:
        """Gives a pytree of arrays that broadcast to BNTS, read by row and column."""
        del sizes
        return ()

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether this query may attend to this key, as a Boolean scalar."""
        raise TypeError(f"{type(self).__name__} must define `allows`")

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, for a mask that reads positions only."""
        return self.allows(b, n, t, s, ())

    def known_blocks(self, where: str, sizes: Sizes, positions: tuple[bool, bool]) -> Any:
        """Gives the block size and the kinds of blocks that the mask brings; usually None.

        `positions` says whether the caller gave positions of queries and of keys. The
        block size is a number of queries and of keys; `jattn.blocks.kinds` says what the
        kinds are.
        """
        del where, sizes, positions

    def __and__(self, other) -> "Mask":
        return And(self, as_mask(other))

    def __rand__(self, other) -> "Mask":
        return And(as_mask(other), self)

    def __or__(self, other) -> "Mask":
        return Or(self, as_mask(other))

    def __ror__(self, other) -> "Mask":
        return Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __repr__(self) -> str:
        """Writes the mask as in Python code, `Causal() & Window(4, 0)`."""
        return as_written(self)

    def __bool__(self):
        raise ValueError("masks: combine masks by & | ~; `and`, `or` and `not` drop one.")


def as_mask(mask, where: str = "masks") -> Mask:
    """Makes a mask from a mask, a Boolean array, or a function of (b, n, t, s)."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, type):
        raise ValueError(
            f"{where}: `mask` must be a mask, got the class {mask.__name__}; call it."
        )
    _refuse_others(where, mask)
    if is_function(mask):
        check_arguments(where, "mask", mask, "b, n, t, s")
        return Pointwise(mask)
    return Explicit(_boolean(where, "mask", mask))


def _refuse_others(where: str, mask) -> None:
    """Raises for what is no mask, but says what was meant."""
    if hasattr(mask, "modify"):
        raise ValueError(
            f"{where}: `mask` must say which pairs count, got the modifier {mask!r}; give "
            f"it as `modifier`."
        )
    if isinstance(mask, str):
        raise ValueError(
            f"{where}: `mask` must be a mask, a Boolean array or a function, got {mask!r}; "
            f"masks with names are in jattn.masks, such as `masks.Causal()`."
        )
    several = mask if isinstance(mask, tuple | list) else ()
    if any(isinstance(x, Mask) or is_function(x) for x in several):
        raise ValueError(
            f"{where}: `mask` must be one mask, got a {type(mask).__name__} of them; "
            f"combine masks by `&`."
        )


def is_function(mask) -> bool:
    """Says whether it is a function, and no array that can be called, as flax has some."""
    return callable(mask) and not hasattr(mask, "__jax_array__")


@pytree(static=("function",))
class Pointwise(Mask):
    """A mask from any function (b, n, t, s) → bool, written for scalars."""

    function: Callable

    def __post_init__(self):
        cure = "a Boolean array is a `masks.Explicit`"
        check_callable("masks.Pointwise", self.function, "(b, n, t, s) → bool", cure)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Calls the function."""
        return self.function(b, n, t, s)


class ByRow(Mask):
    """A mask of arrays that have the axes of the inputs, and are not read by position."""

    def __call__(self, b, n, t, s):
        """Raises: positions alone do not say which row and column are meant."""
        raise ValueError(
            f"masks.{type(self).__name__}: reads its arrays by row and column, not by "
            f"position; combine it by &, | and ~ instead of calling it."
        )


@pytree("array")
class Explicit(ByRow):
    """The mask in full: a Boolean array that broadcasts to BNTS."""

    array: jax.Array

    def aligned(self, sizes) -> Any:
        """Gives the array itself."""
        array = _boolean("masks.Explicit", "array", self.array)
        return align("masks.Explicit", "array", array, sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Gives the array's element for this pair."""
        return elements


@dataclasses.dataclass(frozen=True, eq=False)
class _Both(Mask):
    """A mask of two masks, which reads the arrays of both."""

    left: Mask
    right: Mask
    combine: ClassVar[Callable]

    def aligned(self, sizes) -> Any:
        """Gives the arrays of each mask."""
        return self.left.aligned(sizes), self.right.aligned(sizes)

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, for masks that read positions only."""
        return self.combine(self.left(b, n, t, s), self.right(b, n, t, s))

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Combines what each mask allows."""
        # `aligned` gave a pair of trees, so each mask gets its own elements.
        left, right = elements
        left = self.left.allows(b, n, t, s, left)
        return self.combine(left, self.right.allows(b, n, t, s, right))


@pytree("left", "right")
class And(_Both):
    """A mask of the pairs that both masks allow: `left & right`."""

    combine: ClassVar[Callable] = staticmethod(operator.and_)

    def __repr__(self) -> str:
        return f"{_within(self.left, Or)} & {_within(self.right, Or, And)}"


@pytree("left", "right")
class Or(_Both):
    """A mask of the pairs that at least one mask allows: `left | right`."""

    combine: ClassVar[Callable] = staticmethod(operator.or_)

    def __repr__(self) -> str:
        return f"{self.left!r} | {_within(self.right, Or)}"


@pytree("mask")
class Not(Mask):
    """A mask of the pairs that another mask does not allow: `~mask`."""

    mask: Mask

    def aligned(self, sizes) -> Any:
        """Gives the mask's arrays."""
        return self.mask.aligned(sizes)

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, for a mask that reads positions only."""
        return jnp.logical_not(self.mask(b, n, t, s))

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says the opposite of the mask."""
        return jnp.logical_not(self.mask.allows(b, n, t, s, elements))

    def __repr__(self) -> str:
        return f"~{_within(self.mask, Or, And)}"


def _within(mask: Mask, *looser: type) -> str:
    """Writes a mask; in parentheses if it is a `looser` one, whose operator binds less."""
    return f"({mask!r})" if isinstance(mask, looser) else repr(mask)


def _boolean(where: str, name: str, array) -> jax.Array:
    """Checks that an array is Boolean; the error for a float array names `bias`."""
    array = check_array(where, name, array)
    if array.dtype == jnp.bool_:
        return array
    advice = "convert it with `.astype(bool)`"
    if jnp.issubdtype(array.dtype, jnp.floating):
        advice = "what is added to the logits belongs in `bias`"
    raise ValueError(
        f"{where}: `{name}` must be Boolean (True = may attend), got {array.dtype}; "
        f"{advice}."
    )
