"""A call, laid out so that blocks can be cut from it.

A tile is cut in two steps. First a *head* is cut: some examples and some key/value heads,
over the whole length. Then a tile is cut from the head. A tile has four axes: examples,
key/value heads, and then rows and columns, in either order. Rows are the queries of all G
heads that share a key/value head; columns are keys.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem, index
from jattn.call.program import Index
from jattn.implementations.blockwise.plan import Plan
from jattn.implementations.blockwise.slices import cut_at, padded, put_at


class Aligned(NamedTuple):
    """Arrays that are read by row and column, or parts: BKGTS, any axis may be 1."""

    bias: jax.Array | None
    mask: Any
    modifier: Any
    index: Index
    words: Any


class Layout:
    """The arrays of a call, queries padded to whole blocks.

    Queries are BTN…, keys and values BSK…, and aligned arrays BKGTS.

    Keys are not padded, because padding copies them, and a cache of keys may fill most of
    the memory. If the last block would reach beyond the keys, it starts earlier. Some of
    its columns then belong to the block before it, and `is_own` tells them apart. Keys are
    padded only if their number is symbolic, as it may then be smaller than a block.
    """

    def __init__(
        self, problem: Problem, operands: Operands, plan: Plan, wide=True, wide_logits=True
    ):
        sizes = problem.sizes
        self.problem, self.operands, self.plan = problem, operands, plan
        # `is` also finds a symbolic length that one block has as a whole.
        count = lambda length, size: 1 if size is length else -(-length // size)
        self.counts = {x: count(getattr(sizes, x), getattr(plan, x)) for x in "BKTS"}
        self.padded = {x: self.counts[x] * getattr(plan, x) for x in "TS"}
        if isinstance(sizes.S, int):
            self.padded["S"] = sizes.S
        self.extent = {x: getattr(plan, x) for x in "BKNTS"}  # the size of a cut part
        self.per_block = 1  # how many of these tiles are in one block of queries
        self.is_uneven = not (
            plan.S is sizes.S or (isinstance(sizes.S, int) and sizes.S % plan.S == 0)
        )
        # A product of two bfloat16 numbers is exact in float32, so bfloat16 may stay
        # narrow. Not every platform multiplies float16, so it is widened, tile by tile.
        self.wide, self.narrow = wide, problem.dtype == jnp.bfloat16 and not wide
        # Folded products read the keys once, so these are not widened for the logits.
        self.narrow_logits = self.narrow and (plan.folded or not wide_logits)
        self.query = self._pad(operands.query, {1: "T"})
        self.key, self.value = self.keys(operands.key), self.keys(operands.value)
        self.aligned = self._align()

    def ragged(self) -> "Layout":
        """Gives a layout whose block of keys has only the keys that the last block owns.

        Gives this layout itself if a mask may make other blocks partial too, or if sizes
        are symbolic.
        """
        if self.problem.mask is not None or not self.problem.sizes.are_known:
            return self
        last = copy.copy(self)
        left = self.problem.sizes.S - (self.counts["S"] - 1) * self.plan.S
        last.extent, last.is_uneven = self.extent | {"S": left}, False
        return last

    def in_strips(self, width: int) -> "Layout":
        """Gives a layout whose tiles are strips of the tiles of this one, `width` cells."""
        strips, (T, S) = copy.copy(self), self.plan.cell
        strips.plan, strips.per_block = self.plan._replace(T=T, S=S, cuts=1), self.plan.cuts
        strips.extent = self.extent | {"T": T, "S": min(width * S, self.plan.S)}
        strips.is_uneven = self.is_uneven or self.plan.S % S != 0
        return strips

    def first_key(self, j):
        """Gives the column at which block `j` of the keys starts."""
        start = jnp.asarray(j, jnp.int32) * self.plan.S
        known = isinstance(self.problem.sizes.S, int)
        most = self.problem.sizes.S - self.extent["S"]
        return jnp.minimum(start, most) if known else start

    def is_own(self, j):
        """Says which columns of block `j` are its own, 1111S: not padding, not shared."""
        column = self.first_key(j) + jnp.arange(self.extent["S"], dtype=jnp.int32)
        start = jnp.asarray(j, jnp.int32) * self.plan.S
        own = (column >= start) & (column < self.problem.sizes.S)
        return own.reshape(1, 1, 1, 1, -1)

    def narrowed(self, array):
        """Converts an array to the dtype of the factors of products."""
        return array.astype(self.problem.dtype if self.narrow else self.problem.wide)

    def scaled(self, query):
        """Scales queries; narrow ones stay as they are, and their products are scaled.

        So nothing is rounded to bfloat16, or to the TF32 of a GPU, by the scale.
        """
        if self.narrow_logits:
            return query
        return query.astype(self.problem.wide) * self.operands.scale

    def queries(self, array, fill=0):
        """Pads BTN… to whole blocks of queries."""
        return self._pad(array, {1: "T"}, fill, repeats=False)

    def unqueries(self, array):
        """Removes the padding of BTN…."""
        return array[:, : self.problem.sizes.T]

    def keys(self, array):
        """Pads BSK… if its length is symbolic."""
        return self._pad(array, {1: "S"})

    def align(self, array):
        """Reshapes BNTS to BKGTS and pads its queries."""
        sizes = self.problem.sizes
        B, N, T, S = array.shape
        # An array that all heads share has size 1 for both K and G.
        heads = (1, 1) if N == 1 and sizes.N != 1 else (sizes.K, sizes.G)
        return self._pad(array.reshape(B, *heads, T, S), {3: "T", 4: "S"})

    def unalign(self, array, like):
        """Reshapes BKGTS to BNTS, the shape of `like`, without padding."""
        return array[:, :, :, : like.shape[2], : like.shape[3]].reshape(like.shape)

    def cut(self, array, axes: str, **at):
        """Cuts the part of an array at the blocks `at`.

        Axes of size 1, and axes that `at` does not name, stay whole. If the last block
        would reach beyond the array, it starts earlier: `dynamic_slice` moves it.
        """
        at = self._with_heads(at)
        starts, sizes = [], []
        for letter, length in zip(axes, array.shape, strict=True):
            size = self.extent[letter] if letter in at else length
            whole = isinstance(length, int) and (length == 1 or length == size)
            # A stride of 0 starts at 0 for every block.
            stride = 0 if letter not in at or whole else getattr(self.plan, letter)
            starts.append(stride and at[letter] * stride)
            sizes.append(length if whole else size)
        return cut_at(array, starts, tuple(sizes), self.narrow)

    def put(self, array, part, axes: str, **at):
        """Writes a part to the place that `cut` reads."""
        if part.shape == array.shape:
            return part.astype(array.dtype)
        at = self._with_heads(at)
        starts = [
            0 if x not in at or size == 1 else at[x] * getattr(self.plan, x)
            for x, size in zip(axes, array.shape, strict=True)
        ]
        return put_at(array, part.astype(array.dtype), starts)

    def add(self, array, part, axes: str, **at):
        """Adds a part to the place that `cut` reads."""
        total = self.cut(array, axes, **at) + part.astype(array.dtype)
        return self.put(array, total, axes, **at)

    def rows(self, array, **at):
        """Cuts the rows of a tile, BTN… to BK(GT)…."""
        array = self.cut(array, "BTN" + "." * (array.ndim - 3), **at)
        B, T, N, *rest = array.shape
        G = self.plan.G
        array = jnp.moveaxis(array.reshape(B, T, N // G, G, *rest), 1, 3)  # BKGT…
        return array.reshape(B, N // G, G * T, *rest)

    @property
    def rows_of_block(self) -> tuple[Any, Any, Any]:
        """Gives the shape BK(GT) of the numbers of a block of queries."""
        return self.plan.B, self.plan.K, self.plan.G * self.plan.T

    def put_rows(self, array, part, **at):
        """Writes rows to the place that `rows` reads."""
        B, K, GT, *rest = part.shape
        G, T = self.plan.G, GT // self.plan.G
        part = jnp.moveaxis(part.reshape(B, K, G, T, *rest), 3, 1)  # BTKG…
        part = part.reshape(B, T, K * G, *rest)
        return self.put(array, part, "BTN" + "." * len(rest), **at)

    def row_blocks(self, array, **at):
        """Cuts all rows of a head, BTN… to blocks × BK(GT)…."""
        array = self.cut(array, "BTN" + "." * (array.ndim - 3), **at)
        B, _, N, *rest = array.shape
        G, blocks = self.plan.G, (self.counts["T"], self.plan.T)
        array = array.reshape(B, *blocks, N // G, G, *rest)
        array = jnp.moveaxis(array, (1, 2), (0, 4))  # blocks × BKGT…
        return array.reshape(blocks[0], B, N // G, G * blocks[1], *rest)

    def put_row_blocks(self, array, part, **at):
        """Writes rows to the place that `row_blocks` reads."""
        count, B, K, _, *rest = part.shape
        G, T = self.plan.G, self.plan.T
        part = jnp.moveaxis(part.reshape(count, B, K, G, T, *rest), (0, 4), (1, 2))
        part = part.reshape(B, count * T, K * G, *rest)
        return self.put(array, part, "BTN" + "." * len(rest), **at)

    def by_head(self, array, axis=2):
        """Separates rows by query head, BK(GT)… to BKGT…; they are at `axis`."""
        shape, G = array.shape, self.plan.G
        return array.reshape(*shape[:axis], G, shape[axis] // G, *shape[axis + 1 :])

    def lay(self, array, columns_first: bool = False):
        """Reshapes an aligned part, BKGTS, to four axes: G and T become rows."""
        B, K, G, T, S = array.shape
        if G == 1 and T == 1:  # one row, which broadcasts to all rows
            array = array.reshape(B, K, 1, S)
        else:
            G, T = self.plan.G, self.plan.T
            array = jnp.broadcast_to(array, (B, K, G, T, S)).reshape(B, K, G * T, S)
        return jnp.swapaxes(array, 2, 3) if columns_first else array

    def _with_heads(self, at):
        """Adds the block of N: query heads are cut together with their key/value heads."""
        return at | {"N": at["K"]} if "K" in at else at

    def _align(self) -> Aligned:
        operands = self.operands
        aligned = Aligned(
            operands.bias,
            operands.mask.aligned,
            operands.modifier.aligned,
            index(self.problem, operands),
            operands.rng,
        )
        return jax.tree.map(self.align, aligned)

    def _pad(self, array, axes, fill=0, repeats=True):
        """Pads the axes T and S of an array; axes of size 1 stay.

        If `repeats`, and the number of queries is known, padding repeats the last query.
        """
        shape = list(array.shape)
        for axis, letter in axes.items():
            if not (isinstance(shape[axis], int) and shape[axis] == 1):
                shape[axis] = self.padded[letter]
        queries = (axis for axis, letter in axes.items() if letter == "T")
        return padded(array, tuple(shape), fill, next(queries, None) if repeats else None)
