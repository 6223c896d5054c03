"""Which keys a query may attend to: functions (b, n, t, s) → bool, with `&`, `|`, `~`.

A mask sees one query and one key: the example b, the query head n, and the positions
t and s. True means *may attend*. Any function of these scalars is a mask, alone or
combined with the ones below: `Causal() & (lambda b, n, t, s: doc[t] == doc[s])`.

Masks are frozen dataclasses and JAX pytrees: their arrays may be traced and batched.
A mask may also read arrays that lie along the inputs, by row and column instead of by
position: `aligned` gives them, as any pytree, and `allows` gets the same tree of their
elements at its pair.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays import align, check_integers
from jattn.integers import (
    as_int32,
    check_whole,
    common_dtype,
    is_number,
    one_number,
    padding_number,
    per_example,
)
from jattn.mask import And, ByRow, Explicit, Mask, Pointwise, as_mask
from jattn.pytree import pytree

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
        check_whole("masks.Causal", "offset", self.offset)

    def aligned(self, sizes) -> Any:
        """The offset, so that another one is no other program."""
        return one_number("masks.Causal", "offset", self.offset)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The query, moved by the offset, is not before the key."""
        # The sum of a position and a large offset could wrap; no difference of two does.
        return s - t <= elements

    def __call__(self, b, n, t, s):
        """The same, by the number itself."""
        return self.allows(b, n, t, s, as_int32(self.offset))


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
                check_whole("masks.Window", name, side)
            if isinstance(side, int | np.integer) and side < 0:
                raise ValueError(
                    f"masks.Window: `{name}` must be ≥ 0, or None for no limit, got "
                    f"{side}; a window always holds the query's own position."
                )

    def aligned(self, sizes) -> Any:
        """How far it reaches, so that another width is no other program."""
        sides = {"left": self.left, "right": self.right}
        return [
            None if side is None else one_number("masks.Window", name, side)
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
        sides = [None if x is None else as_int32(x) for x in (self.left, self.right)]
        return self.allows(b, n, t, s, sides)


@pytree("length")
class Prefix(Mask):
    """Every query sees the first keys: s < length, one for all or one per example.

    `Prefix(p) | Causal()` is the mask of a prefix language model.
    """

    length: int | jax.Array

    def __post_init__(self):
        check_whole("masks.Prefix", "length", self.length)

    def aligned(self, sizes) -> Any:
        """The length, of each example where there is more than one."""
        return per_example("masks.Prefix", "length", self.length, sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """The key is in the prefix."""
        return s < elements

    def __call__(self, b, n, t, s):
        """The same, where one length serves all examples."""
        length: Any = self.length
        length = length[b] if jnp.ndim(length) else as_int32(length)
        return self.allows(b, n, t, s, length)


@pytree("query_ids", "key_ids", "padding_id")
class Segments(ByRow):
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
            check_whole("masks.Segments", "padding_id", self.padding_id, signed=False)

    def aligned(self, sizes) -> Any:
        """The ids of rows and of columns, and that of padding, all of one type."""
        where = "masks.Segments"
        ids = {"query_ids": self.query_ids, "key_ids": self.key_ids}
        if self.key_ids is None:
            ids = {"query_ids": self.query_ids, "query_ids (as key_ids)": self.query_ids}
        ids = {name: check_integers(where, name, array) for name, array in ids.items()}
        dtype = common_dtype(where, ids)
        rows, columns = (
            align(where, name, array.astype(dtype), sizes, axis)
            for (name, array), axis in zip(ids.items(), "TS", strict=True)
        )
        if self.padding_id is None:
            return rows, columns, None
        return rows, columns, padding_number(where, self.padding_id, dtype)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Both are of one segment, and that is not the padding."""
        query_id, key_id, padding_id = elements
        same = query_id == key_id
        return same if padding_id is None else same & (query_id != padding_id)


@pytree("key_lengths", "query_lengths")
class Lengths(ByRow):
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
        sides.append((column, per_example(where, "key_lengths", self.key_lengths, sizes)))
        if self.query_lengths is not None:
            row = jnp.arange(sizes.T, dtype=jnp.int32).reshape(1, 1, -1, 1)
            lengths = per_example(where, "query_lengths", self.query_lengths, sizes)
            sides.append((row, lengths))
        return sides

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Neither is beyond its length."""
        inside = jnp.bool_(True)
        for index, length in elements:
            inside = inside & (index < length)
        return inside


def in_words(mask) -> Mask | None:
    """The mask, if it is `Causal`, `Window` or both, with Python's or NumPy's numbers."""
    if isinstance(mask, And):
        sides = in_words(mask.left), in_words(mask.right)
        return None if None in sides else mask
    numbers = {Causal: ("offset",), Window: ("left", "right")}.get(type(mask))
    if numbers is None:
        return None
    values = [getattr(mask, name) for name in numbers]
    return mask if all(x is None or is_number(x) for x in values) else None
