"""Which keys a query may attend to: functions (b, n, t, s) → bool, with `&`, `|`, `~`.

A mask sees one query and one key: the example b, the query head n, and the positions
t and s. True means *may attend*. Any function of these scalars is a mask, alone or
combined with the ones below: `Causal() & (lambda b, n, t, s: doc[t] == doc[s])`.

Masks are frozen dataclasses and JAX pytrees: their arrays may be traced and batched.
A mask may also read arrays that lie along the inputs, by row and column instead of by
position: `aligned` gives them, as any pytree, and `allows` gets the same tree of their
elements at its pair.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays import align, check_array, check_integers, is_known, saturate
from jattn.pytree import as_written, pytree
from jattn.shapes import Sizes

__all__ = [
    "Causal",
    "Explicit",
    "Lengths",
    "Mask",
    "Pointwise",
    "Prefix",
    "Segments",
    "Window",
    "as_mask",
]


class Mask:
    """A predicate on pairs of a query and a key; subclasses say which pairs count."""

    __array_ufunc__ = None  # so that `array & mask` asks the mask

    def aligned(self, sizes: Sizes) -> Any:
        """A pytree of arrays that broadcast to BNTS, read by row and column."""
        del sizes
        return ()

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Whether this query may attend to this key, as a Boolean scalar."""
        raise TypeError(f"{type(self).__name__} must define `allows`")

    def __call__(self, b, n, t, s):
        """The same, for a mask that reads positions only."""
        return self.allows(b, n, t, s, ())

    def known_blocks(self, where: str, sizes: Sizes, positions: tuple[bool, bool]) -> Any:
        """Gives the blocks and their kinds that the mask brings with it; None as a rule.

        `positions` says whether those of queries and of keys were given. The blocks are
        how many queries and keys one has, the kinds as `jattn.blocks.kinds` has them.
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
        """The mask as one writes it, `Causal() & Window(4, 0)`."""
        return as_written(self)

    def __bool__(self):
        raise ValueError("masks: combine masks by & | ~; `and`, `or` and `not` drop one.")


def as_mask(mask, where: str = "masks") -> Mask:
    """A mask from a mask, a Boolean array, or a function of (b, n, t, s)."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, type):
        raise ValueError(
            f"{where}: `mask` must be a mask, got the class {mask.__name__}; call it."
        )
    if callable(mask):
        return Pointwise(mask)
    return Explicit(_boolean(where, "mask", mask))


@pytree(static=("function",))
class Pointwise(Mask):
    """A mask from any function (b, n, t, s) → bool, written for scalars."""

    function: Callable

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Asks the function."""
        return self.function(b, n, t, s)


@pytree("offset")
class Causal(Mask):
    """No query sees a later key: t + offset ≥ s.

    The corner is a matter of positions. For T queries at the end of S keys, the last
    query sees every key with `Causal(S - T)`, or with `query_position=S - T`.

        Causal()   1 0 0 0      Causal(1)   1 1 0 0
                   1 1 0 0                  1 1 1 0
                   1 1 1 0                  1 1 1 1
    """

    offset: int | jax.Array = 0

    def __post_init__(self):
        _check_whole("masks.Causal", "offset", self.offset)

    def aligned(self, sizes) -> Any:
        """The offset, so that another one is no other program."""
        return _number("masks.Causal", "offset", self.offset)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The query, moved by the offset, is not before the key."""
        # The sum of a position and a large offset could wrap; no difference of two does.
        return s - t <= elements

    def __call__(self, b, n, t, s):
        """The same, by the number itself."""
        return self.allows(b, n, t, s, _int32(self.offset))


@pytree("left", "right")
class Window(Mask):
    """Each query sees the keys around it: t − left ≤ s ≤ t + right.

    `None` on a side sets no limit there.

        Window(1, 0)   1 0 0 0      Window(1, 1)   1 1 0 0
                       1 1 0 0                     1 1 1 0
                       0 1 1 0                     0 1 1 1
                       0 0 1 1                     0 0 1 1
    """

    left: int | jax.Array | None
    right: int | jax.Array | None

    def __post_init__(self):
        for name in ("left", "right"):
            side = getattr(self, name)
            if side is not None:
                _check_whole("masks.Window", name, side)
            if isinstance(side, int | np.integer) and side < 0:
                raise ValueError(
                    f"masks.Window: `{name}` must be ≥ 0, or None for no limit, got "
                    f"{side}; a window always holds the query's own position."
                )

    def aligned(self, sizes) -> Any:
        """How far it reaches, so that another width is no other program."""
        sides = {"left": self.left, "right": self.right}
        return [
            None if side is None else _number("masks.Window", name, side)
            for name, side in sides.items()
        ]

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The key is no further to the left or right."""
        left, right = elements
        inside = jnp.bool_(True)
        if left is not None:
            inside = t - s <= left
        if right is not None:
            inside = inside & (s - t <= right)
        return inside

    def __call__(self, b, n, t, s):
        """The same, by the numbers themselves."""
        sides = [None if x is None else _int32(x) for x in (self.left, self.right)]
        return self.allows(b, n, t, s, sides)


@pytree("length")
class Prefix(Mask):
    """Every query sees the first keys: s < length, one for all or one per example.

    `Prefix(p) | Causal()` is the mask of a prefix language model.
    """

    length: int | jax.Array

    def __post_init__(self):
        _check_whole("masks.Prefix", "length", self.length)

    def aligned(self, sizes) -> Any:
        """The length, of each example where there is more than one."""
        return _per_example("masks.Prefix", "length", self.length, sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The key is in the prefix."""
        return s < elements

    def __call__(self, b, n, t, s):
        """The same, where one length serves all examples."""
        length: Any = self.length
        length = length[b] if jnp.ndim(length) else _int32(length)
        return self.allows(b, n, t, s, length)


class _ByRow(Mask):
    """A mask of arrays that lie along the inputs."""

    def __call__(self, b, n, t, s):
        """Refuses: positions alone do not say which row and column are meant."""
        raise ValueError(
            f"masks.{type(self).__name__}: reads its arrays by row and column, not by "
            f"position; combine it by &, | and ~ instead of calling it."
        )


@pytree("query_ids", "key_ids", "padding_id")
class Segments(_ByRow):
    """A query sees the keys of its own segment: query_ids[row] = key_ids[column].

    Ids are integers, `T` and `S` or `BT` and `BS`; without `key_ids` the query's are
    taken. Rows and columns whose id is `padding_id` see nothing and are not seen.

        Segments(jnp.array([7, 7, 8]))   1 1 0
                                         1 1 0
                                         0 0 1
    """

    query_ids: jax.Array
    key_ids: jax.Array | None = None
    padding_id: int | jax.Array | None = None

    def __post_init__(self):
        if self.padding_id is not None:
            _check_whole("masks.Segments", "padding_id", self.padding_id, signed=False)

    def aligned(self, sizes) -> Any:
        """The ids of rows and of columns, and that of padding, all of one type."""
        where = "masks.Segments"
        ids = {"query_ids": self.query_ids, "key_ids": self.key_ids}
        if self.key_ids is None:
            ids = {"query_ids": self.query_ids, "query_ids (as key_ids)": self.query_ids}
        ids = {name: check_integers(where, name, array) for name, array in ids.items()}
        dtype = _common_dtype(where, ids)
        rows, columns = (
            align(where, name, array.astype(dtype), sizes, axis)
            for (name, array), axis in zip(ids.items(), "TS", strict=True)
        )
        if self.padding_id is None:
            return rows, columns, None
        return rows, columns, _padding_id(where, self.padding_id, dtype)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Both are of one segment, and that is not the padding."""
        query_id, key_id, padding_id = elements
        same = query_id == key_id
        return same if padding_id is None else same & (query_id != padding_id)


@pytree("key_lengths", "query_lengths")
class Lengths(_ByRow):
    """Only the first rows and columns of each example count.

        column < key_lengths[b]    row < query_lengths[b]

    Lengths are integers, one for all or one per example. A row beyond its length sees
    nothing: its output is zero.
    """

    key_lengths: int | jax.Array
    query_lengths: int | jax.Array | None = None

    def aligned(self, sizes) -> Any:
        """Each side's index and length; without `query_lengths` the key's alone."""
        where, sides = "masks.Lengths", []
        column = jnp.arange(sizes.S, dtype=jnp.int32).reshape(1, 1, 1, -1)
        sides.append((column, _per_example(where, "key_lengths", self.key_lengths, sizes)))
        if self.query_lengths is not None:
            row = jnp.arange(sizes.T, dtype=jnp.int32).reshape(1, 1, -1, 1)
            lengths = _per_example(where, "query_lengths", self.query_lengths, sizes)
            sides.append((row, lengths))
        return sides

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Neither is beyond its length."""
        inside = jnp.bool_(True)
        for index, length in elements:
            inside = inside & (index < length)
        return inside


@pytree("array")
class Explicit(_ByRow):
    """The mask in full: a Boolean array that broadcasts to BNTS."""

    array: jax.Array

    def aligned(self, sizes) -> Any:
        """The array itself."""
        array = _boolean("masks.Explicit", "array", self.array)
        return align("masks.Explicit", "array", array, sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """What the array says."""
        return elements


@dataclasses.dataclass(frozen=True, eq=False)
class _Both(Mask):
    """Two masks; reads the arrays of both."""

    left: Mask
    right: Mask
    combine: ClassVar[Callable]

    def aligned(self, sizes) -> Any:
        """The arrays of each."""
        return self.left.aligned(sizes), self.right.aligned(sizes)

    def __call__(self, b, n, t, s):
        """The same, for masks that read positions only."""
        return self.combine(self.left(b, n, t, s), self.right(b, n, t, s))

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Combines what each allows."""
        left, right = elements
        left = self.left.allows(b, n, t, s, left)
        return self.combine(left, self.right.allows(b, n, t, s, right))


@pytree("left", "right")
class And(_Both):
    """Both masks allow it: `left & right`."""

    combine: ClassVar[Callable] = staticmethod(operator.and_)

    def __repr__(self) -> str:
        return f"{_within(self.left, Or)} & {_within(self.right, Or, And)}"


@pytree("left", "right")
class Or(_Both):
    """Either mask allows it: `left | right`."""

    combine: ClassVar[Callable] = staticmethod(operator.or_)

    def __repr__(self) -> str:
        return f"{self.left!r} | {_within(self.right, Or)}"


@pytree("mask")
class Not(Mask):
    """The mask does not allow it: `~mask`."""

    mask: Mask

    def aligned(self, sizes) -> Any:
        """The mask's arrays."""
        return self.mask.aligned(sizes)

    def __call__(self, b, n, t, s):
        """The same, for a mask that reads positions only."""
        return jnp.logical_not(self.mask(b, n, t, s))

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The opposite of what the mask allows."""
        return jnp.logical_not(self.mask.allows(b, n, t, s, elements))

    def __repr__(self) -> str:
        return f"~{_within(self.mask, Or, And)}"


def _within(mask: Mask, *looser: type) -> str:
    """Writes a mask, in parentheses if it is one of those that bind more loosely."""
    return f"({mask!r})" if isinstance(mask, looser) else repr(mask)


def in_words(mask) -> Mask | None:
    """The mask, if it is `Causal`, `Window` or both, with Python's or NumPy's numbers."""
    if isinstance(mask, And):
        sides = in_words(mask.left), in_words(mask.right)
        return None if None in sides else mask
    numbers = {Causal: ("offset",), Window: ("left", "right")}.get(type(mask))
    if numbers is None:
        return None
    values = [getattr(mask, name) for name in numbers]
    return mask if all(x is None or _is_number(x) for x in values) else None


def _is_number(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _int32(x):
    """An integer that combines with positions under strict promotion."""
    return int(x) if _is_number(x) else saturate(jnp.asarray(x))


def _number(where: str, name: str, value):
    """One whole number as 1111, int32; one beyond its ends is as good as these.

    It is NumPy's where it is known, so that what it hides is found before the call runs.
    """
    number = saturate(check_integers(where, name, value))
    if number.size != 1:
        raise ValueError(
            f"{where}: `{name}` must be one whole number, got shape {number.shape}; for "
            f"one of each example write a function, `lambda b, n, t, s: …{name}[b]…`."
        )
    return number.reshape(1, 1, 1, 1)


def _common_dtype(where: str, ids: dict):
    """A type that holds the ids of both sides, or a sentence saying that there is none."""
    left, right = (array.dtype for array in ids.values())
    if left == right:
        return left
    dtype = np.promote_types(left, right)
    if (
        dtype.kind == "f"
        or not jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype)).dtype == dtype
    ):
        raise ValueError(
            f"{where}: `query_ids` and `key_ids` must be of one type, or of two that a "
            f"third holds, got {left} and {right}; convert one with `.astype`."
        )
    return dtype


def _padding_id(where: str, value, dtype):
    """The id of padding as 1111, in the type of the ids."""
    number = check_array(where, "padding_id", value) if hasattr(value, "dtype") else value
    ends = jnp.iinfo(dtype)
    known = is_known(number)
    if known and not ends.min <= int(number) <= ends.max:
        raise ValueError(
            f"{where}: `padding_id` must be one of the numbers that ids of {dtype} can "
            f"have, got {number}."
        )
    if known:
        return np.full((1, 1, 1, 1), int(number), dtype)
    return _number(where, "padding_id", number).astype(dtype)


def _check_whole(where: str, name: str, value, signed: bool = True) -> None:
    """Raises for what is no whole number that JAX has a type for, or array of them.

    Leaves anything else that JAX may put into a pytree alone.
    """
    dtype = getattr(value, "dtype", None)
    if _is_number(value):
        bits = jnp.iinfo(jnp.asarray(0).dtype).bits
        if -(2 ** (bits - 1)) <= int(value) < 2 ** (bits - signed):
            return
        got = f"{value}, which does not fit {bits} bits"
    elif dtype is not None:
        if jnp.issubdtype(dtype, jnp.integer):
            return
        got = f"an array of {dtype}"
    elif value is None or isinstance(value, float | bool | str | list | tuple):
        got = repr(value)
    else:
        return
    raise ValueError(f"{where}: `{name}` must be a whole number, got {got}.")


def _boolean(where: str, name: str, array) -> jax.Array:
    """A Boolean array; a float one is told where it belongs."""
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


def _per_example(where: str, name: str, array, sizes: Sizes) -> jax.Array:
    """One integer for all or one per example, as B111; as int32, which rows count in."""
    array = saturate(check_integers(where, name, array))
    if array.shape not in ((), sizes.batch, (1,) * len(sizes.batch)):
        raise ValueError(
            f"{where}: `{name}` must have shape () or B = {sizes.batch}, got "
            f"{array.shape}; give one length for all or one per example."
        )
    if array.ndim == 0:
        return array.reshape(1, 1, 1, 1)
    return align(where, name, array, sizes, "")
