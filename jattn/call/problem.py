"""One call, taken apart: a `Problem` of static facts and the `Operands` it applies to.

Equal problems share one compiled program. Everything that may change from call to call
without changing the program, document ids and slopes included, is an operand.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.call.program import Arrays, Index, Program, trace
from jattn.dropout import Dropout, keep, words
from jattn.masks import Explicit, Mask, as_mask, in_words
from jattn.modifiers import as_modifier
from jattn.shapes import (
    Sizes,
    align,
    check_array,
    check_range,
    flatten_batch,
    is_one,
    measure,
    positions,
    spread_positions,
    wide_dtype,
)


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


def pose(
    where: str,
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
) -> tuple[Problem, Operands]:
    """Checks the arguments of `where` and takes them apart.

    Raises:
        ValueError: *where: what must hold, what was got, what to do*.
    """
    query, key = check_array(where, "query", query), check_array(where, "key", key)
    value = check_array(where, "value", value)
    sizes = measure(where, query, key, value)
    wide = wide_dtype(query.dtype)
    problem, operands = pose_mask(
        where,
        sizes,
        query.dtype,
        mask=mask,
        modifier=modifier,
        query_position=query_position,
        key_position=key_position,
    )
    rate, shared, rng = _check_dropout(where, dropout)
    named = {"bias": bias, "scale": scale}
    config: Any = jax.config  # whose attributes type checkers do not know
    precision = config.jax_default_matmul_precision
    problem = dataclasses.replace(
        problem,
        rate=rate,
        shared=shared,
        precision=precision,
        given=problem.given | {name for name, x in named.items() if x is not None},
    )
    return problem, operands._replace(
        query=flatten_batch(query, sizes),
        key=flatten_batch(key, sizes),
        value=flatten_batch(value, sizes),
        scale=_check_scale(where, scale, sizes).astype(wide),
        bias=None if bias is None else check_bias(where, bias, sizes).astype(wide),
        rng=rng,
    )


def pose_mask(
    where: str,
    sizes: Sizes,
    dtype,
    *,
    mask=None,
    modifier=None,
    query_position=None,
    key_position=None,
) -> tuple[Problem, Operands]:
    """Takes apart what decides which blocks are skipped; the inputs are left out.

    Raises:
        ValueError: As `pose` does.
    """
    blocks = kinds = None
    are_given = given(query_position), given(key_position)
    if isinstance(mask, Mask):
        known = mask.known_blocks(where, sizes, are_given)
        blocks, kinds = known or (None, None)
    query_position = positions(where, "query_position", query_position, sizes, "T")
    key_position = positions(where, "key_position", key_position, sizes, "S")
    query_position, key_position, fits = check_range(
        where, sizes, query_position, key_position
    )
    if mask is None and modifier is None:  # nothing compares positions
        fits = None
    mask_program, mask_arrays = _trace_mask(where, mask, sizes)
    traced = _trace_modifier(where, modifier, sizes, wide_dtype(dtype))
    modifier_program, modifier_arrays = traced
    problem = Problem(
        sizes,
        jnp.dtype(dtype),
        mask_program,
        modifier_program,
        0.0,
        blocks,
        named=in_words(mask),
        given=frozenset({"positions"} if any(are_given) else ()),
    )
    inputs: dict[str, Any] = dict.fromkeys(
        ("query", "key", "value", "scale", "bias", "rng")
    )
    operands = Operands(
        **inputs,
        mask=mask_arrays,
        modifier=modifier_arrays,
        query_position=query_position,
        key_position=key_position,
        kinds=kinds,
        fits=fits,
    )
    return problem, operands


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


def check_sink(where: str, sink, sizes: Sizes) -> jax.Array | None:
    """The sink of each query head, `N`."""
    if sink is None:
        return None
    sink = _check_floating(where, "sink", sink)
    if sink.shape not in ((), (sizes.N,)):
        raise ValueError(
            f"{where}: `sink` must be one number or N = ({sizes.N},), one per query head, "
            f"got shape {sink.shape}."
        )
    return jnp.broadcast_to(sink, (sizes.N,))


def _trace_mask(where, mask, sizes):
    if mask is None:
        return None, Arrays()
    made = as_mask(mask, where)
    if made is not mask and isinstance(made, Explicit):
        align(where, "mask", made.array, sizes)  # whose message names what the user gave
    mask = made
    elements, tree = jax.tree.flatten(mask.aligned(sizes))

    def allows(b, n, t, s, *elements):
        return mask.allows(b, n, t, s, tree.unflatten(elements))

    return trace(f"{where}: `mask`", allows, elements)


def _trace_modifier(where, modifier, sizes, wide):
    if modifier is None:
        return None, Arrays()
    modifier = as_modifier(modifier, where)
    elements, tree = jax.tree.flatten(modifier.aligned(sizes))

    def modify(logit, b, n, t, s, *elements):
        return modifier.modify(logit, b, n, t, s, tree.unflatten(elements))

    return trace(f"{where}: `modifier`", modify, elements, wide)


def _check_floating(where, name, array):
    array = check_array(where, name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        hint = "; a Boolean array belongs in `mask`" if array.dtype == jnp.bool_ else ""
        raise ValueError(f"{where}: `{name}` must be floating, got {array.dtype}{hint}.")
    return array


def check_bias(where: str, bias, sizes: Sizes) -> jax.Array:
    """The bias as BNTS, any axis 1."""
    return align(where, "bias", _check_floating(where, "bias", bias), sizes)


def _check_scale(where, scale, sizes):
    if scale is None:
        return jnp.asarray(sizes.H**-0.5 if sizes.H else 1.0)
    scale = check_array(where, "scale", scale)
    real = any(jnp.issubdtype(scale.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if scale.shape != () or not real:
        raise ValueError(
            f"{where}: `scale` must be one real number, got "
            f"{scale.dtype}{list(scale.shape)}; a scale per head belongs in `modifier`."
        )
    return scale


def _check_dropout(where, dropout):
    if dropout is None:
        return 0.0, False, None
    if not isinstance(dropout, Dropout):
        raise ValueError(
            f"{where}: `dropout` must be jattn.Dropout(rate, rng), got "
            f"{type(dropout).__name__}."
        )
    return dropout.rate, dropout.shared, dropout.rng
