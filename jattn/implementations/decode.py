"""A few queries by a long buffer of keys, in the time of the keys that they may see.

A decoding step attends from one query to the part of a buffer that is filled. How much that
is, a mask says when the program runs: `Causal()` with a traced `query_position`, `Lengths`,
a window, or any function. So the buffer is looked at in chunks, and a table of them says
which the mask leaves empty:

    at most half of the chunks live    a loop over these, each copied to be multiplied
    more                               all at once, where the keys lie

The second needs vectors that are multiplied as they are: not widened, and all heads by one
product. Nothing of the buffer's size is made besides the buffer. Caches go the same
way: `parts` has what is common.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.blocks import of_call
from jattn.blocks.kinds import EMPTY, spread
from jattn.call.problem import Operands, Problem
from jattn.implementations import parts
from jattn.implementations.kernel import Kernel
from jattn.implementations.sums import Sums
from jattn.operations.mapped import in_any_slice

# With at most so many queries the chunks that one of them sees are looked at for all.
FEW = 16
# One product of all K heads has K times the arithmetic, but takes the keys in their order.
# Up to so many rows in all it is faster: with 8 heads of one row a third of the time.
MIXED = 64


class Buffer(NamedTuple):
    """Keys BSKH and values BSKD of a caller, as a source; see `source.Source`."""

    key: Any  # an array, or its shape
    value: Any
    mixes: bool  # whether one product serves all heads
    fits: bool = False  # whether all slots may be multiplied at once

    slots = property(lambda self: self.key.shape[1])
    unit = property(lambda self: 1)
    num_heads = property(lambda self: self.key.shape[2])

    def apart(self) -> "Buffer":
        """Gives the same, with a product for each head.

        In a product of all heads zeros stand for the others, and 0 · NaN is NaN.
        """
        return self._replace(mixes=False)

    def lies_ready(self, wide) -> bool:
        """Says whether all slots can be multiplied as they are: one matrix, as wide."""
        is_one = self.mixes or self.num_heads == 1
        return self.fits and is_one and self.key.dtype == wide

    def cut(self, start, size: int) -> "Buffer":
        """Gives the slots from `start` on."""
        if size == self.slots:
            return self
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)
        return Buffer(cut(self.key), cut(self.value), self.mixes)

    def whole(self) -> "Buffer":
        """Gives itself."""
        return self

    def vectors(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Gives all keys and values."""
        return self.key.astype(dtype), self.value.astype(dtype)

    def products(self, rows, wide) -> jax.Array:
        """Multiplies rows BKRH by the keys, BKRS."""
        key = self.key.astype(wide)
        if not self.mixes:
            # XLA:CPU copies a left factor in runs of H numbers. A right one it transposes,
            # which takes twice as long.
            return jnp.swapaxes(jnp.einsum("BSKH,BKRH->BKSR", key, rows), 2, 3)
        B, K, R, H = rows.shape
        own = jnp.eye(K, dtype=bool)[None, :, None, :, None]
        rows = jnp.where(own, rows[:, :, :, None], 0).reshape(B, K * R, K * H)
        products = jnp.einsum("BSX,BYX->BSY", key.reshape(B, -1, K * H), rows)
        return jnp.swapaxes(products, 1, 2).reshape(B, K, R, -1)

    def sums(self, weights, wide) -> jax.Array:
        """Sums up the values, each times its weight BKRS, to BKRD."""
        value = self.value.astype(wide)
        if not self.mixes:
            return jnp.einsum("BKRS,BSKD->BKRD", weights, value)
        B, K, R, S = weights.shape
        weights = jnp.swapaxes(weights.reshape(B, K * R, S), 1, 2)
        sums = jnp.einsum("BSY,BSX->BYX", weights, value.reshape(B, S, -1))
        # Every head by every other; those of one head are its own.
        return jnp.einsum("BKRKD->BKRD", sums.reshape(B, K, R, K, -1))

    def vectors_of_values(self, wide) -> jax.Array:
        """Gives the values, BKSD."""
        return jnp.swapaxes(self.value, 1, 2).astype(wide)


@dataclasses.dataclass(frozen=True)
class Decode(Kernel):
    """Few queries on CPU, chunk by chunk, only where a mask lets them look.

    Attributes:
        least: How many keys there must be, so that leaving some out pays.
    """

    least: int = 2 * parts.CHUNK
    exact = False  # its products add up in another order than those of blockwise
    isolates = True
    sets_blocks = True

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Refuses other platforms, many queries, few keys, and calls that see all keys."""
        sizes = problem.sizes
        if platform != "cpu":
            return f"runs on CPU only, and the platform is {platform}."
        if not sizes.are_known:
            return "needs sizes that are numbers; these are symbols."
        if 0 in (*sizes.BNTS, sizes.H, sizes.D):
            return "needs at least one query, key and number in each."
        if sizes.T > FEW:
            return f"takes up to {FEW} queries, got T={sizes.T}."
        if self.least > sizes.S:
            return f"pays where there are {self.least} keys or more, got S={sizes.S}."
        if problem.mask is None and problem.modifier is None:
            return "leaves out keys that a mask or modifier hides, got neither."
        return None

    def block_sizes(self, problem, operands, platform) -> tuple[int, int]:
        """Gives all queries and a chunk of keys; all keys where too many chunks count."""
        del platform
        T, chunk = problem.sizes.T, _chunk(problem)
        live = None if operands is None else _live(problem, operands)
        if not isinstance(live, np.ndarray):
            return T, chunk
        whole = parts.takes_all(_shape(problem), problem.wide, np.sum(live) * chunk)
        return T, problem.sizes.S if whole else chunk

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes the output and the sums of each row."""
        # The barrier: XLA would move what joins an axis of `vmap` into the branch for all
        # keys, and copy them there into another order of axes.
        key, value = lax.optimization_barrier((operands.key, operands.value))
        operands = operands._replace(key=key, value=value)
        source = _buffer(problem, operands)
        # One list serves all slices of a `vmap`, or each chunk would be a gather.
        live = in_any_slice(jnp.asarray(_live(problem, operands)))
        order = jnp.argsort(~live, stable=True).astype(jnp.int32)
        end = jnp.sum(live, dtype=jnp.int32) * _chunk(problem)
        return Sums(*parts.attend(problem, operands, source, end, order))


def _live(problem: Problem, operands: Operands):
    """Says which chunks some query of some example sees; NumPy where that is known."""
    blocks = problem.sizes.T, _chunk(problem)
    kinds = of_call.block_table(problem, operands, *blocks)
    lengths = problem.sizes.T, problem.sizes.S
    return (spread(kinds, lengths, blocks) != EMPTY).any(axis=(0, 1, 2))


def _chunk(problem: Problem) -> int:
    return parts.chunk_of(problem, _shape(problem))


def _buffer(problem: Problem, operands: Operands) -> Buffer:
    return Buffer(operands.key, operands.value, *_ways(problem))


def _shape(problem: Problem) -> Buffer:
    """Gives the buffer of a call by shapes alone."""
    x = problem.sizes
    key, value = (
        jax.ShapeDtypeStruct((x.B, x.S, x.K, size), problem.dtype) for size in (x.H, x.D)
    )
    return Buffer(key, value, *_ways(problem))


def _ways(problem: Problem) -> tuple[bool, bool]:
    """Says whether one product serves all heads, and whether all logits may be at once."""
    B, N, T, S = problem.sizes.BNTS
    return problem.sizes.K > 1 and N * T <= MIXED, B * N * T * S <= parts.LOGITS
