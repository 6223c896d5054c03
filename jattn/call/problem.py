"""One call, taken apart: a `Problem` of static facts and the `Operands` it applies to.

Equal problems share one compiled program. Everything that can change from call to call
without a new program is an operand, document ids and slopes included.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.arrays.positions import spread_positions
from jattn.arrays.shapes import Sizes, is_one, wide_dtype
from jattn.call.program import Arrays, Index, Program
from jattn.dropout import keep, words
from jattn.masks import Mask


@dataclasses.dataclass(frozen=True)
class Problem:
    """The facts that decide which program is compiled; hashable."""

    sizes: Sizes
    dtype: jnp.dtype
    mask: Program | None
    modifier: Program | None
    rate: float  # of dropout
    blocks: tuple[int, int] | None = None  # block size of the table in `Operands.kinds`
    settled: bool = False  # whether that table accounts for everything that is skipped
    shared: bool = False  # whether one draw of dropout serves all examples and heads
    precision: str | None = None  # of products, as `jax.default_matmul_precision` says
    # Options the caller gave, of "bias", "scale", "positions", "logsumexp"; cuDNN refuses
    # each.
    given: frozenset[str] = frozenset()
    # The mask, if `Causal` and `Window` with known numbers make it. Only cuDNN uses it, and
    # its programs hold these numbers. Other implementations take the numbers as operands;
    # for them it is None.
    named: Mask | None = None
    # How many examples the caller's batch has, if the slices of a `vmap` joined it: b
    # starts again at 0 after so many.
    examples: int | None = None
    # Whether these keys are a part of those that the rows see: then derivatives are given
    # the output, maximum and sum of all keys, and must not compute them from the part.
    part: bool = False
    # How many keys before and after its own row a query sees at most, rounded up; None if
    # these are many or not known.
    near: tuple[int, int] | None = None

    @property
    def wide(self) -> jnp.dtype:
        """Gives the precision of logits, softmax and sums."""
        return wide_dtype(self.dtype)

    @property
    def is_precise(self) -> bool:
        """Says whether products are to be more precise than a platform makes them."""
        return self.precision not in (None, "default")


class Operands(NamedTuple):
    """The arrays of a call, with one batch axis; None where an option is absent."""

    query: jax.Array  # BTNH
    key: jax.Array  # BSKH
    value: jax.Array  # BSKD
    scale: jax.Array
    bias: jax.Array | None  # BNTS, any axis 1
    mask: Arrays
    modifier: Arrays
    query_position: jax.Array | None  # BT (B may be 1), or the first one; None: 0, 1, …
    key_position: jax.Array | None  # BS, likewise
    rng: Any  # of dropout: a random key, or the words that were drawn from it
    kinds: jax.Array | None = None  # kinds of the blocks, see `jattn.blocks.kinds`
    fits: jax.Array | None = None  # for traced positions: whether int32 held them


VECTORS = "query", "key", "value"


def with_wide_vectors(problem: Problem, operands: Operands) -> Operands:
    """Gives queries, keys and values in the wide precision, and so their cotangents.

    For what several operations read. Each would round its cotangent to the dtype of what
    it reads; where these mostly cancel, their sum is little but rounding.
    """
    return _vectors_as(problem.wide, operands)


def with_narrow_vectors(problem: Problem, operands: Operands) -> Operands:
    """Gives queries, keys and values in the dtype of the problem, that of their numbers."""
    return _vectors_as(problem.dtype, operands)


def _vectors_as(dtype, operands: Operands) -> Operands:
    vectors = (getattr(operands, name).astype(dtype) for name in VECTORS)
    return operands._replace(**dict(zip(VECTORS, vectors, strict=True)))


def apart(operands: Operands):
    """Gives the operands as implementations take them, and a function for the results.

    The function makes all results NaN if traced positions did not fit int32. Otherwise a
    mask would compare positions that have wrapped around, and be wrong silently.
    """
    fits = operands.fits
    if fits is None:
        return operands, lambda arrays: arrays
    spoil = lambda x: jnp.where(fits, x, jnp.nan)
    return operands._replace(fits=None), lambda arrays: jax.tree.map(spoil, arrays)


def asking_logsumexp(problem: Problem) -> Problem:
    """Gives the problem of a caller who needs the logsumexp besides the output."""
    return dataclasses.replace(problem, given=problem.given | {"logsumexp"})


def given(position) -> bool:
    """Says whether positions may be other than 0, 1, …: all but None and a Python 0."""
    return not (position is None or (isinstance(position, int) and position == 0))


def example(problem: Problem, xp):
    """Gives the number b of each example, B or 1 of them; xp is `numpy` or `jax.numpy`."""
    # An axis of length 1, since then b is 0 everywhere.
    if is_one(problem.examples):
        return xp.zeros(1, xp.int32)
    count = xp.arange(problem.sizes.B, dtype=xp.int32)
    return count if problem.examples is None else count % problem.examples


def index(problem: Problem, operands: Operands) -> Index:
    """Gives the example, the head and the positions of every pair."""
    sizes = problem.sizes
    return Index(
        b=example(problem, jnp)[:, None, None, None],
        n=jnp.arange(sizes.N, dtype=jnp.int32)[None, :, None, None],
        t=spread_positions(operands.query_position, sizes.T)[:, None, :, None],
        s=spread_positions(operands.key_position, sizes.S)[:, None, None, :],
    )


def kept(problem: Problem, operands: Operands, index: Index):
    """Says which weights dropout keeps; None without dropout."""
    if operands.rng is None:
        return None
    query_words, key_words = drawn(problem, operands, index)
    return keep(query_words, key_words, problem.rate)


def drawn(problem: Problem, operands: Operands, index: Index):
    """Computes the words of dropout for queries and for keys."""
    b, n = index.b, index.n
    # A shared draw is that of example 0 and head 0, as in `definition`.
    if problem.shared:
        b = n = jnp.zeros((1, 1, 1, 1), jnp.int32)
    query_words = words(operands.rng, b, n, index.t, side=0)
    return query_words, words(operands.rng, b, n, index.s, side=1)


def select_rows(problem: Problem, operands: Operands, rows: jax.Array):
    """Gives the same call for some of its queries only."""
    count = rows.shape[0]

    def cut(array):  # an axis of length 1 stands for all queries
        return array if array.shape[2] == 1 else jnp.take(array, rows, axis=2)

    def cut_aligned(arrays):
        return arrays._replace(aligned=tuple(map(cut, arrays.aligned)))

    sizes = dataclasses.replace(problem.sizes, T=count)
    # A block table describes blocks of all queries, so it does not fit the chosen ones.
    # Nor do windows lie where they did.
    chosen = dataclasses.replace(problem, sizes=sizes, blocks=None, near=None)
    return chosen, operands._replace(
        kinds=None,
        query=jnp.take(operands.query, rows, axis=1),
        bias=None if operands.bias is None else cut(operands.bias),
        mask=cut_aligned(operands.mask),
        modifier=cut_aligned(operands.modifier),
        query_position=jnp.take(
            spread_positions(operands.query_position, problem.sizes.T), rows, axis=1
        ),
    )
