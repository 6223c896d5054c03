"""Masks with names: causal, windows, prefixes, segments, lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import align, check_integers, known_number
from jattn.arrays.integers import (
    as_int32,
    check_whole,
    common_dtype,
    is_number,
    one_number,
    padding_number,
    per_example,
)
from jattn.masks.mask import And, ByRow, Mask, Or
from jattn.pytree import pytree


@pytree("offset")
class Causal(Mask):
    """A mask that hides later keys from each query: t + offset ≥ s.

    Positions decide where the diagonal lies. For T queries at the end of S keys, the last
    query sees every key with `Causal(S - T)`, or with `query_position=S - T`.

        Causal()   1 0 0 0      Causal(1)   1 1 0 0
                   1 1 0 0                  1 1 1 0
                   1 1 1 0                  1 1 1 1
    """

    offset: int | jax.Array = 0

    def __post_init__(self):
        check_whole("masks.Causal", "offset", self.offset)

    def aligned(self, sizes) -> Any:
        """Gives the offset as an operand, so that all offsets share one program."""
        return one_number("masks.Causal", "offset", self.offset)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether the key is at most `offset` after the query."""
        # t + offset could wrap around int32; `check_range` ensures that s − t does not.
        return s - t <= elements

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, with the offset itself."""
        return self.allows(b, n, t, s, as_int32("masks.Causal", "offset", self.offset))


@pytree("left", "right")
class Window(Mask):
    """A mask that shows each query the keys around it: t − left ≤ s ≤ t + right.

    `None` on a side sets no limit there. A traced number is not checked: below 0, the
    window lacks the query's own position.

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
            number = known_number(side)
            if number is not None and number < 0:
                raise ValueError(
                    f"masks.Window: `{name}` must be ≥ 0, or None for no limit, got "
                    f"{side}; a window always holds the query's own position."
                )

    def aligned(self, sizes) -> Any:
        """Gives the widths as operands, so that all widths share one program."""
        sides = {"left": self.left, "right": self.right}
        return [
            None if side is None else one_number("masks.Window", name, side)
            for name, side in sides.items()
        ]

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether the key is within `left` and `right` of the query."""
        left, right = elements
        inside = jnp.bool_(True)
        if left is not None:
            inside = t - s <= left
        if right is not None:
            inside = inside & (s - t <= right)
        return inside

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, with the widths themselves."""
        sides = [
            None if side is None else as_int32("masks.Window", name, side)
            for name, side in (("left", self.left), ("right", self.right))
        ]
        return self.allows(b, n, t, s, sides)


@pytree("length")
class Prefix(Mask):
    """A mask that shows every query the first keys: s < length.

    The length is one number for all examples, or one for each example.

    `Prefix(p) | Causal()` is the mask of a prefix language model.
    """

    length: int | jax.Array

    def __post_init__(self):
        check_whole("masks.Prefix", "length", self.length)

    def aligned(self, sizes) -> Any:
        """Gives the length, or the length of each example."""
        return per_example("masks.Prefix", "length", self.length, sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether the key is in the prefix."""
        return s < elements

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, with the length itself."""
        length: Any = as_int32("masks.Prefix", "length", self.length)
        # b counts the examples of all batch axes.
        length = jnp.ravel(length)[b] if jnp.ndim(length) else length
        return self.allows(b, n, t, s, length)


@pytree("query_ids", "key_ids", "padding_id")
class Segments(ByRow):
    """A mask that shows a query the keys of its segment: query_ids[row] = key_ids[column].

    Ids are integers, `T` and `S` or `BT` and `BS`; without `key_ids` the keys have the
    ids of the queries. A row whose id is `padding_id` sees nothing, and no row sees a
    column whose id is `padding_id`.

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
        """Gives the ids of rows and of columns and the id of padding, all of one type."""
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
        """Says whether both are in one segment, and that is not the padding."""
        query_id, key_id, padding_id = elements
        # Where the two ids are equal, it is enough to compare one of them with padding.
        same = query_id == key_id
        return same if padding_id is None else same & (query_id != padding_id)


@pytree("key_lengths", "query_lengths")
class Lengths(ByRow):
    """A mask of the first rows and columns of each example.

        column < key_lengths[b]    row < query_lengths[b]

    Lengths are integers, one for all or one per example. A row beyond its length sees
    nothing: its output is zero.
    """

    key_lengths: int | jax.Array
    query_lengths: int | jax.Array | None = None

    def aligned(self, sizes) -> Any:
        """Gives each side's indices and lengths; only the keys' without `query_lengths`."""
        where, sides = "masks.Lengths", []
        # Lengths count rows and columns, not positions, so these are aligned arrays too.
        column = jnp.arange(sizes.S, dtype=jnp.int32).reshape(1, 1, 1, -1)
        sides.append((column, per_example(where, "key_lengths", self.key_lengths, sizes)))
        if self.query_lengths is not None:
            row = jnp.arange(sizes.T, dtype=jnp.int32).reshape(1, 1, -1, 1)
            lengths = per_example(where, "query_lengths", self.query_lengths, sizes)
            sides.append((row, lengths))
        return sides

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says whether the row and the column are within their lengths."""
        inside = jnp.bool_(True)
        for index, length in elements:
            inside = inside & (index < length)
        return inside


def reach(mask) -> tuple[float, float]:
    """Says how many keys before and after its own position a query sees at most.

    ∞ where nothing limits it, or nothing that is known.
    """
    known = lambda x: float(x) if is_number(x) else np.inf
    if isinstance(mask, And | Or):
        nearer = min if isinstance(mask, And) else max
        before, after = zip(reach(mask.left), reach(mask.right), strict=True)
        return nearer(before), nearer(after)
    if isinstance(mask, Causal):
        return np.inf, known(mask.offset)
    if isinstance(mask, Window):
        return known(mask.left), known(mask.right)
    return np.inf, np.inf


def in_words(mask) -> Mask | None:
    """Gives the mask if `Causal` and `Window` with known numbers make it, else None."""
    if isinstance(mask, And):
        sides = in_words(mask.left), in_words(mask.right)
        return None if None in sides else mask
    numbers = {Causal: ("offset",), Window: ("left", "right")}.get(type(mask))
    if numbers is None:
        return None
    values = [getattr(mask, name) for name in numbers]
    return mask if all(x is None or is_number(x) for x in values) else None
