"""The arrays of a cache, and how many of its slots one step of the kernel reads.

Keys are heads first and transposed, values heads first: both products take them as they
lie, so nothing of the cache's size is ever copied.

    keys      B × K × H × S                    logits (rows, S) = query (rows, H) · keys
    values    B × K × S × D                    output (rows, D) = weights (rows, S) · values
    scales    B × K × S, where numbers are rounded
    table     B × pages, where B above counts pages and S the slots of one
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # numbers in a row of a vector register
# Slots and bytes of a step. A copy of less takes longer than its bytes do, and a block of
# the table of more makes short contexts read what they do not need (`bench/tpu.md`).
MOST_SLOTS = 1024
MOST_BYTES = 3 * 2**20


class Slots(NamedTuple):
    """The arrays of a cache with one batch axis.

    Attributes:
        keys: B × K × H × S, or with pages in the place of examples.
        values: B × K × S × D; None where values are the first D numbers of the keys.
        key_scales: B × K × S; None where the numbers are exact.
        value_scales: Likewise; None also where values are a part of the keys.
        table: The pages of each example, B × pages; None without pages.
    """

    keys: jax.Array
    values: jax.Array | None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    table: jax.Array | None = None


def as_read(cache: Slots) -> tuple[Slots, bool]:
    """Gives the arrays as the kernel reads them, and whether values are then D × S.

    A row of a register has 128 numbers. XLA lays out values of fewer in the order of their
    transpose, where nothing is padded; then to transpose them costs nothing, and to read
    them in the order of their axes would copy all of them.
    """
    if cache.values is None:  # the first rows of the keys
        return cache, True
    S, D = cache.values.shape[2:]
    padded = lambda x, unit: -(-x // unit) * unit
    if padded(S, 8) * padded(D, LANES) <= padded(D, 8) * padded(S, LANES):
        return cache, False
    return cache._replace(values=jnp.swapaxes(cache.values, 2, 3)), True


class Cut(NamedTuple):
    """How slots are cut into blocks, one for each step.

    Attributes:
        slots: S, of each example.
        piece: How many slots one copy takes: a block, or a page.
        pieces: How many copies a block takes.
    """

    slots: int
    piece: int
    pieces: int

    @property
    def size(self) -> int:
        """Counts the slots of a block."""
        return self.piece * self.pieces

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        return -(-self.slots // self.size)

    @property
    def has_padding(self) -> bool:
        """Says whether the last block has slots that are not there."""
        return self.slots % self.size > 0


class Part(NamedTuple):
    """Some slots of a block that are computed together.

    Attributes:
        first: Where it starts in the block.
        size: How many slots it has.
        atoms: Which pieces it is made of: number, first slot in the piece, size.
    """

    first: int
    size: int
    atoms: tuple[tuple[int, int, int], ...]


def cut_of(slots: Slots, num_slots: int, most: int = MOST_SLOTS) -> Cut:
    """Chooses the blocks: of at most so many slots, in whole lanes."""
    _, _, H, page = slots.keys.shape
    D = 0 if slots.values is None else slots.values.shape[-1]
    each = (H + D) * slots.keys.dtype.itemsize
    most = max(min(most, MOST_BYTES // each // LANES * LANES), LANES)
    if slots.table is None:
        return Cut(num_slots, min(most, -(-num_slots // LANES) * LANES), 1)
    return Cut(num_slots, page, max(min(most // page, slots.table.shape[1]), 1))


def parts(cut: Cut, width: int) -> list[Part]:
    """Cuts a block into parts of about `width` slots, a multiple of the lanes."""
    step = min(width, cut.piece)
    inside = [(x, min(step, cut.piece - x)) for x in range(0, cut.piece, step)]
    atoms = [(i, *place) for i in range(cut.pieces) for place in inside]
    found, first = [], 0
    while atoms:
        taken = [atoms.pop(0)]
        while atoms and sum(x[2] for x in taken) + atoms[0][2] <= width:
            taken.append(atoms.pop(0))
        size = sum(x[2] for x in taken)
        found.append(Part(first, size, tuple(taken)))
        first += size
    return found


def numbers(array: jax.Array, dtype) -> jax.Array:
    """Gives stored numbers in the dtype of products: exactly, as they have fewer bits."""
    if array.dtype == jnp.uint8:
        return _float8(array.astype(jnp.int32)).astype(dtype)
    if array.dtype == jnp.int8:
        return array.astype(jnp.int32).astype(jnp.float32).astype(dtype)
    return array.astype(dtype)


def _float8(bits: jax.Array) -> jax.Array:
    """Reads the bits of float8_e4m3fn: seeee mmm is ±2^(e − 7) · (1 + m / 8).

    With e = 0 it is ±2^−9 · m. Not every TPU reads such numbers by itself, and subnormal
    numbers of float32, which a shift of the bits would make, count as 0.
    """
    low = bits & 0x7F
    normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
    size = jnp.where(low < 8, low.astype(jnp.float32) * 2**-9, normal)
    return jnp.where(bits > 0x7F, -size, size)


@functools.lru_cache(maxsize=1024)
def objection(dtype: str, page: int | None) -> str | None:
    """Says why the kernel cannot read slots of a dtype or in pages; None if it can."""
    if dtype == "int4":
        return "reads numbers of 8 bits or more, got int4, two in a byte."
    if page is not None and page % LANES:
        return f"takes pages of a multiple of {LANES} slots, got {page}."
    return None
