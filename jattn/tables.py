"""Which blocks of pairs a mask leaves empty, partial or full, as data to keep and reuse.

A kind is 0 where no pair of a block may attend, 1 where some may or nothing is known, and
2 where all may. Kinds are int8, B or 1 × N or 1 × query blocks × key blocks; an axis of
blocks may be 1 too, where they are all of one kind. Nothing here is ever wrong by being 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.masks import Mask
from jattn.pointwise import pytree
from jattn.shapes import Sizes

EMPTY, PARTIAL, FULL = 0, 1, 2
_MOST_CELLS = 20  # along each side of a picture
_GLYPHS = " ░█"


@pytree("mask", "kinds", static=("lengths", "blocks", "positions"))
class BlockTable(Mask):
    """A mask, and of each of its blocks whether it is empty, partial or full.

    `jattn.block_table` makes one. Given as `mask`, it means what the mask means, and the
    implementation takes the kinds of its blocks from it instead of asking the mask again.
    It is a pytree: many layers can share one, through `jit` and `scan`, or each have its
    own. Combined by `&`, `|` and `~` it counts as its mask alone. `print` draws it.

    Attributes:
        mask: What may attend.
        kinds: 0 empty, 1 partial, 2 full; B or 1 × N or 1 × query blocks × key blocks.
        lengths: T and S.
        blocks: How many queries and how many keys a block has.
        positions: Whether it was made with `query_position` and with `key_position`.
    """

    mask: Mask
    kinds: jax.Array
    lengths: tuple[int, int]
    blocks: tuple[int, int]
    positions: tuple[bool, bool] = (False, False)

    def aligned(self, sizes: Sizes) -> Any:
        """The mask's arrays."""
        return self.mask.aligned(sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """What the mask allows."""
        return self.mask.allows(b, n, t, s, elements)

    def __call__(self, b, n, t, s):
        """The same, for a mask that reads positions only."""
        return self.mask(b, n, t, s)

    def check(self, where: str, sizes: Sizes, positions: tuple[bool, bool]) -> None:
        """Raises unless the table is of this many queries and keys, placed alike."""
        advice = "make one for this call with `jattn.block_table`"
        if self.lengths != (sizes.T, sizes.S):
            raise ValueError(
                f"{where}: `mask` is a block table for T={self.lengths[0]} and "
                f"S={self.lengths[1]}, but the inputs have T={sizes.T} and S={sizes.S}; "
                f"{advice}."
            )
        for letter, have in zip("BN", self.kinds.shape[:2], strict=True):
            if have not in (1, getattr(sizes, letter)):
                raise ValueError(
                    f"{where}: `mask` is a block table for {letter}={have}, but the inputs "
                    f"have {letter}={getattr(sizes, letter)}; {advice}."
                )
        names = ("query_position", "key_position")
        for name, made, given in zip(names, self.positions, positions, strict=True):
            if made != given:
                with_or_not = "with" if made else "without"
                raise ValueError(
                    f"{where}: `mask` is a block table made {with_or_not} `{name}`; give "
                    f"the positions that it was made with, or {advice}."
                )

    def __repr__(self) -> str:
        (T, S), (rows, columns) = self.lengths, self.blocks
        axes = "×".join(map(str, np.shape(self.kinds)[:-2]))
        return f"BlockTable({axes}×{T}×{S} in blocks of {rows}×{columns})"

    def __str__(self) -> str:
        kinds = self.kinds
        if isinstance(kinds, jax.core.Tracer) or not hasattr(kinds, "ndim"):
            return f"{self!r}: known when it runs"
        kinds = np.asarray(spread(np.asarray(kinds), self.lengths, self.blocks))
        text = f"{self!r}:\n{', '.join(shares(kinds))}"
        if not kinds.size:
            return text
        kinds = kinds.reshape(-1, *kinds.shape[-2:])
        if len(kinds) > 1:
            text += "; of the first:"
        return "\n".join([text, *draw(kinds[0])])


def resize(kinds, lengths, blocks, wanted):
    """Kinds for blocks of another size, sound and as precise as they can be had.

    A block inside another one inherits its kind; one that overlaps several is empty or
    full if all of these are.

    Args:
        kinds: Of the blocks at hand; NumPy's or in the graph, and so is the result.
        lengths: T and S.
        blocks: The size of the blocks at hand.
        wanted: The size of those asked for.

    Returns:
        The kinds, int8; an axis of blocks is 1 where it was.
    """
    low = high = kinds
    for axis, length, have, want in zip((-2, -1), lengths, blocks, wanted, strict=True):
        if kinds.shape[axis] == 1 or have == want:
            continue
        overlaps = _overlaps(length, have, want)
        low = _over(low, overlaps, axis, "min")
        high = _over(high, overlaps, axis, "max")
    xp = _module(kinds)
    return xp.where(low == high, low, PARTIAL).astype(np.int8)


def _overlaps(length: int, have: int, want: int) -> np.ndarray:
    """For each block wanted, which ones it overlaps; the last is repeated."""
    first = np.arange(0, length, want)
    start, last = first // have, (np.minimum(first + want, length) - 1) // have
    most = np.max(last - start, initial=0) + 1
    return np.minimum(start[:, None] + np.arange(most), last[:, None])


def _over(kinds, overlaps, axis, extreme):
    xp = _module(kinds)
    parts = xp.take(kinds, overlaps.reshape(-1), axis=axis)
    shape = list(kinds.shape)
    shape[kinds.ndim + axis : kinds.ndim + axis + 1] = overlaps.shape
    return getattr(xp, extreme)(parts.reshape(shape), axis=kinds.ndim + axis + 1)


def spread(kinds, lengths, blocks):
    """The kinds with their two last axes in full."""
    counts = [-(-length // block) for length, block in zip(lengths, blocks, strict=True)]
    return _module(kinds).broadcast_to(kinds, (*kinds.shape[:-2], *counts))


def shares(kinds: np.ndarray) -> list[str]:
    """Which share of the blocks is of each kind, as text."""
    names = {"empty": EMPTY, "partial": PARTIAL, "full": FULL}
    whole = max(kinds.size, 1)
    return [
        f"{percent(np.count_nonzero(kinds == kind) / whole)} {name}"
        for name, kind in names.items()
    ]


def percent(share: float) -> str:
    """A share as text, which says 0 % and 100 % only of none and all."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(100 * share, 0.1), 99.9):.3g} %"


def draw(kinds: np.ndarray) -> list[str]:
    """Draws kinds as at most 20 × 20 characters: █ full, ░ partial, blank empty."""
    wanted = [-(-count // _MOST_CELLS) for count in kinds.shape]
    cells = resize(kinds, kinds.shape, (1, 1), wanted)
    cells = np.broadcast_to(
        cells, [-(-n // w) for n, w in zip(kinds.shape, wanted, strict=True)]
    )
    return ["".join(_GLYPHS[kind] for kind in row).rstrip() for row in cells]


def _module(kinds):
    return np if isinstance(kinds, np.ndarray) else jnp
