"""One call, taken apart: a `Problem` of static facts and the `Operands` it applies to.

Equal problems share one compiled program. Everything that may change from call to call
without changing the program, document ids and slopes included, is an operand.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.call.program import Arrays, Index, Program
from jattn.dropout import keep, words
from jattn.mask import Mask
from jattn.positions import spread_positions
from jattn.shapes import Sizes, is_one, wide_dtype


@dataclasses.dataclass(frozen=True)
class Problem:
    """The facts that decide what is compiled; hashable."""

    sizes: Sizes
    dtype: jnp.dtype
    mask: Program | None
    modifier: Program | None
    rate: float  # of dropout
    blocks: tuple[int, int] | None = None  # of a block table that came with the mask
    settled: bool = False  # whether that table says all that is skipped
    shared: bool = False  # whether one draw of dropout serves all examples and heads
    precision: str | None = None  # of products: what `jax.default_matmul_precision` says
    # Which of bias, scale and positions are not the default, and whether the logsumexp is
    # asked for; some implementations have none of them.
    given: frozenset[str] = frozenset()
    # The mask, where it is made of `Causal` and `Window` with numbers that are known: for
    # cuDNN, whose programs hold them. Others take the numbers as operands, and None here.
    named: Mask | None = None
    # How many queries and keys a tile has, where the mask's numbers decided it beforehand.
    size: int | None = None
    # How many examples b counts before it starts again, where slices of a `vmap` joined
    # the batch.
    examples: int | None = None
    # Whether these keys are a part of those that the rows see: then derivatives are given
    # the output, maximum and sum of all keys, and must not compute them from the part.
    part: bool = False

    @property
    def wide(self) -> jnp.dtype:
        """The precision of logits, softmax and sums."""
        return wide_dtype(self.dtype)


class Operands(NamedTuple):
    """The arrays of a call, with one batch axis; None where an option is absent."""

    query: jax.Array  # BTNH
    key: jax.Array  # BSKH
    value: jax.Array  # BSKD
    scale: jax.Array
    bias: jax.Array | None  # BNTS, any axis 1
    mask: Arrays
    modifier: Arrays
    query_position: jax.Array | None  # BT, B may be 1, or the first; None: 0, 1, …
    key_position: jax.Array | None  # BS, likewise
    rng: Any  # of dropout: a random key, or the words that were drawn from it
    kinds: jax.Array | None = None  # of the blocks, see `jattn.blocks.kinds`
    fits: jax.Array | None = None  # whether int32 held the positions, where they are traced


def apart(operands: Operands):
    """The operands as implementations take them, and what spoils results that are wrong.

    That gives NaN where traced positions did not fit int32: a mask that compares wrapped
    ones would be wrong without a word.
    """
    fits = operands.fits
    if fits is None:
        return operands, lambda arrays: arrays
    spoil = lambda x: jnp.where(fits, x, jnp.asarray(jnp.nan, x.dtype))
    return operands._replace(fits=None), lambda arrays: jax.tree.map(spoil, arrays)


def asking_logsumexp(problem: Problem) -> Problem:
    """The problem of a caller who needs the logsumexp, and not only the output."""
    return dataclasses.replace(problem, given=problem.given | {"logsumexp"})


def given(position) -> bool:
    """Whether positions are other than 0, 1, …, as far as can be told."""
    return not (position is None or (isinstance(position, int) and position == 0))


def example(problem: Problem, xp):
    """The number b of each example, of B or 1, by `numpy` or `jax.numpy`."""
    if is_one(problem.examples):
        return xp.zeros(1, xp.int32)
    count = xp.arange(problem.sizes.B, dtype=xp.int32)
    return count if problem.examples is None else count % problem.examples


def index(problem: Problem, operands: Operands) -> Index:
    """Example, head and positions of every pair."""
    sizes = problem.sizes
    return Index(
        b=example(problem, jnp)[:, None, None, None],
        n=jnp.arange(sizes.N, dtype=jnp.int32)[None, :, None, None],
        t=spread_positions(operands.query_position, sizes.T)[:, None, :, None],
        s=spread_positions(operands.key_position, sizes.S)[:, None, None, :],
    )


def kept(problem: Problem, operands: Operands, index: Index):
    """Which weights dropout leaves, or None without dropout."""
    if operands.rng is None:
        return None
    query_words, key_words = drawn(problem, operands, index)
    return keep(query_words, key_words, problem.rate)


def drawn(problem: Problem, operands: Operands, index: Index):
    """The words of dropout, of queries and of keys."""
    b, n = index.b, index.n
    if problem.shared:
        b = n = jnp.zeros((1, 1, 1, 1), jnp.int32)
    query_words = words(operands.rng, b, n, index.t, side=0)
    return query_words, words(operands.rng, b, n, index.s, side=1)


def select_rows(problem: Problem, operands: Operands, rows: jax.Array):
    """The same call for some of its queries."""
    count = rows.shape[0]

    def cut(array):
        return array if array.shape[2] == 1 else jnp.take(array, rows, axis=2)

    def cut_aligned(arrays):
        return arrays._replace(aligned=tuple(map(cut, arrays.aligned)))

    sizes = dataclasses.replace(problem.sizes, T=count)
    # A table is of all queries.
    return dataclasses.replace(problem, sizes=sizes, blocks=None), operands._replace(
        kinds=None,
        query=jnp.take(operands.query, rows, axis=1),
        bias=None if operands.bias is None else cut(operands.bias),
        mask=cut_aligned(operands.mask),
        modifier=cut_aligned(operands.modifier),
        query_position=jnp.take(
            spread_positions(operands.query_position, problem.sizes.T), rows, axis=1
        ),
    )
