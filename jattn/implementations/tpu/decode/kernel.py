"""Output, maximum and sum of a few rows, block by block of the slots.

Logits are rows × slots. For each part of a block

    top′    = max(top, maxₛ logitₛ)
    total′  = total · exp(top − top′) + Σₛ exp(logitₛ − top′)
    output′ = output · exp(top − top′) + Σₛ exp(logitₛ − top′) vₛ

A scale of a key multiplies its logits, and one of a value its weights: numbers of 8 bits
are multiplied as they are. Exponentials have the base 2, as in `forward`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattn.blocks.kinds import EMPTY, FULL, PARTIAL
from jattn.call.problem import Problem
from jattn.implementations.joint import Extras, Pairs
from jattn.implementations.tpu.decode import slots, steps
from jattn.implementations.tpu.decode.slots import LANES, Cut, Part, Slots
from jattn.implementations.tpu.decode.tile import Tile
from jattn.implementations.tpu.pairs import spread

VMEM = 48 * 2**20  # bytes that the kernel may use, as in forward


@dataclasses.dataclass(frozen=True)
class Call:
    """The static description of a call.

    Attributes:
        problem: The call.
        cut: Its blocks of slots.
        width: How many slots are computed together.
        turned: Whether values are read as D × slots.
        pairs: The programs that join a query and a key.
        shapes: The types of the `Extras` before they were arranged.
        steps: The shape of the steps: examples, heads, steps.
        count: The number of steps, if it is known.
        interpret: Whether and how the kernel is emulated.
    """

    problem: Problem
    cut: Cut
    width: int
    turned: bool
    pairs: Pairs
    shapes: Extras
    steps: tuple[int, ...]
    count: int | None
    interpret: Any

    @property
    def rows(self) -> int:
        """Counts the rows of a key head."""
        return self.problem.sizes.G * self.problem.sizes.T

    def at(self, b, k, step):
        """Gives where the word of a step is; one example or head may serve all of them."""
        B, K, count = self.steps
        return ((b if B > 1 else 0) * K + (k if K > 1 else 0)) * count + step

    def dot(self, x, y, axis: int):
        """Multiplies rows by a matrix along its `axis`; exactly if inputs are float32."""
        exact = self.problem.dtype == jnp.float32
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
        contracted = (((1,), (axis,)), ((), ()))
        wide = jnp.float32
        return lax.dot_general(
            x, y, contracted, precision=precision, preferred_element_type=wide
        )


class Arguments(NamedTuple):
    """The arrays of a call: the first three lie in the memory of scalars.

    Attributes:
        words: The steps, flat.
        pages: The table of pages, flat; None without pages.
        numbers: The factors of products, of exponents of 2, and of maxima.
        query: B × K × rows × H, times the part of the scale that it takes.
        slots: The cache.
        extras: The arrays that masks, modifiers, bias and dropout read, arranged.
    """

    words: jax.Array
    pages: jax.Array
    numbers: jax.Array
    query: jax.Array
    slots: Slots
    extras: Extras


def run(call: Call, arguments: Arguments, count):
    """Computes output B × K × rows × D, maximum and sum B × K × rows × 1."""
    sizes, rows = call.problem.sizes, call.rows
    leading = arguments.query.shape[:2]
    varying = jax.typeof(arguments.query).manual_axis_type
    result = lambda size: jax.ShapeDtypeStruct(
        (*leading, rows, size), jnp.float32, manual_axis_type=varying
    )
    inputs, specs = _inputs(call, arguments)
    leaves, tree = jax.tree.flatten(inputs)
    of_row = lambda size: pl.BlockSpec((1, 1, rows, size), lambda b, k, *_: (b, k, 0, 0))
    scratch = lambda size: pltpu.VMEM((rows, size), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, call, tree),
        name="jattn_decode",
        interpret=call.interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(*leading, count if call.count is None else call.count),
            in_specs=jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
            out_specs=[of_row(size) for size in (sizes.D, 1, 1)],
            scratch_shapes=[scratch(size) for size in (LANES, LANES, sizes.D)],
        ),
        out_shape=[result(size) for size in (sizes.D, 1, 1)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
    )(arguments.words, arguments.pages, arguments.numbers, *leaves)


class _Inputs(NamedTuple):
    """What the kernel reads from memory; each of the cache once for each piece."""

    query: Any
    keys: list
    values: list
    key_scales: list
    value_scales: list
    extras: Extras


def _inputs(call: Call, arguments: Arguments) -> tuple[_Inputs, _Inputs]:
    """Gives the inputs of the kernel and their specs."""
    cache, pieces = arguments.slots, range(call.cut.pieces)
    if not call.interpret:
        # Where there is room, XLA would copy all of a small cache to the memory that the
        # kernel computes in; the kernel itself copies what it reads, and no more.
        hold = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
        cache = cache._replace(**{k: hold(x) for k, x in _vectors(cache).items()})
    query = (1, 1, *arguments.query.shape[2:])
    first = pl.BlockSpec(query, lambda b, k, *_: (b, k, 0, 0))
    specs = jax.tree.map(functools.partial(_extra_spec, call), arguments.extras)

    def spec(array, axis: int, piece: int):
        return _slot_spec(call, array, axis, piece, cache.table)

    def of_each(make, query, extras) -> _Inputs:
        """Gives what belongs to each input; nothing to arrays that are not there."""
        each = lambda x, axis: [] if x is None else [make(x, axis, i) for i in pieces]
        return _Inputs(
            query,
            keys=each(cache.keys, 3),
            values=each(cache.values, 3 if call.turned else 2),
            key_scales=each(cache.key_scales, 2),
            value_scales=each(cache.value_scales, 2),
            extras=extras,
        )

    same = lambda array, *_: array
    return of_each(same, arguments.query, arguments.extras), of_each(spec, first, specs)


def _vectors(cache: Slots) -> dict[str, jax.Array]:
    """Gives the large arrays of a cache by name."""
    pairs = {"keys": cache.keys, "values": cache.values}
    return {name: x for name, x in pairs.items() if x is not None}


def _slot_spec(call: Call, array, axis: int, piece: int, table):
    """Makes the spec of a piece: the slots of one head, or the scales of all heads.

    A block of one head's scales alone would have one row, which no copy can take out of
    rows of eight heads.
    """
    count, one = call.cut.pieces, array.ndim == 4
    shape = [1, 1 if one else array.shape[1], *array.shape[2:]]
    shape[axis] = call.cut.piece

    def index(b, k, step, words, pages, _):
        at = steps.block(words[call.at(b, k, step)])
        if table is not None:
            most = table.shape[1]
            b, at = pages[b * most + jnp.minimum(at * count + piece, most - 1)], 0
        place = [b, k if one else 0, 0, 0][: array.ndim]
        place[axis] = at
        return tuple(place)

    return pl.BlockSpec(tuple(shape), index)


def _extra_spec(call: Call, array):
    """Makes the spec of an arranged array."""
    B, K, rows, length = array.shape
    along = length > 1  # a column or a tile
    shape = (1, 1, rows, call.cut.size if along else 1)

    def index(b, k, step, words, *_):
        at = steps.block(words[call.at(b, k, step)]) if along else 0
        return b if B > 1 else 0, k if K > 1 else 0, 0, at

    return pl.BlockSpec(shape, index)


def _kernel(call: Call, tree, words, pages, numbers, *refs):
    """Adds one block to the sums; the first step clears them, the last divides."""
    del pages  # the specs read it
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    output, row_max, row_sum, *state = refs[tree.num_leaves :]
    top, total, sums = state
    step = pl.program_id(2)
    word = words[call.at(pl.program_id(0), pl.program_id(1), step)]

    @pl.when(step == 0)
    def _start():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    _over_kinds(call, word, functools.partial(_block, call, inputs, numbers, state, word))

    @pl.when(word & steps.LAST != 0)
    def _finish():
        all_of, most = total[:, :1], top[:, :1]
        empty = all_of == 0
        # Dropout's 1 / (1 − rate) is applied here, once for each row.
        share = 1 / (jnp.where(empty, 1, all_of) * (1 - call.problem.rate))
        output[0, 0] = sums[...] * share
        row_max[0, 0] = jnp.where(empty, 0, most * numbers[2])
        row_sum[0, 0] = all_of


def _over_kinds(call: Call, word, block) -> None:
    """Runs `block(masked, padded)` unless the block is empty."""
    kind = steps.kind(word)
    full = (kind == FULL) if call.problem.mask is not None else (kind != EMPTY)
    last = steps.block(word) == call.cut.blocks - 1
    if call.cut.has_padding:
        pl.when((kind != EMPTY) & last)(lambda: block(masked=True, padded=True))
        full &= ~last
    pl.when(full)(lambda: block(masked=False, padded=False))
    if call.problem.mask is not None:
        partial = (kind == PARTIAL) & ~last if call.cut.has_padding else kind == PARTIAL
        pl.when(partial)(lambda: block(masked=True, padded=False))


def _block(call: Call, inputs: _Inputs, numbers, state, word, masked, padded) -> None:
    """Adds one block of slots to the running maximum, sum and output."""
    top, total, sums = state
    size, exponent = numbers[0], numbers[1]
    todo = slots.parts(call.cut, call.width)
    coming = _products(call, inputs, todo[0])
    for part, following in zip(todo, [*todo[1:], None], strict=True):
        logits = coming
        if following is not None:  # keeps the matrix unit busy during the softmax
            coming = _products(call, inputs, following)
        tile = Tile(call, inputs.extras, steps.block(word), part)
        if call.pairs.modifier is not None or inputs.extras.bias is not None:
            logits = tile.logits(logits * size)
        allowed = tile.allowed(padded) if masked else None
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        before = top[...]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        safe = jnp.where(now == -jnp.inf, 0, now)  # −∞ − (−∞) would be NaN
        weights = jnp.exp2((logits - safe[:, :1]) * exponent)
        shrink = jnp.exp2((before - safe) * exponent)
        top[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        kept = tile.kept()
        weights = weights if kept is None else jnp.where(kept, weights, 0)
        added = _weighted(call, inputs, part, weights, tile.inside if padded else None)
        sums[...] = sums[...] * shrink[:, :1] + added


def _products(call: Call, inputs: _Inputs, part: Part):
    """Multiplies the rows by the keys of a part: rows × slots, with the keys' scales."""
    query = inputs.query[0, 0]
    read = lambda i, at, n: slots.numbers(inputs.keys[i][0, 0, :, at : at + n], query.dtype)
    products = [call.dot(query, read(*atom), 0) for atom in part.atoms]
    scales = _scales(inputs.key_scales, part)
    products = _joined(products)
    return products if scales is None else products * scales


def _weighted(call: Call, inputs: _Inputs, part: Part, weights, inside):
    """Sums up the values of a part by weights; slots that are not `inside` count as 0.

    What is read beyond the last slot may be NaN, and 0 · NaN is NaN.
    """
    shared = [] if inputs.values else inputs.key_scales
    scales = _scales(inputs.value_scales or shared, part)
    if scales is not None:
        scales = scales if inside is None else jnp.where(inside, scales, 0)
        weights = weights * scales
    weights, total, first = weights.astype(call.problem.dtype), 0, 0
    for atom in part.atoms:
        some = weights[:, first : first + atom[2]]
        values = _values(call, inputs, atom, inside is not None)
        total += call.dot(some, values, int(call.turned))
        first += atom[2]
    return total


def _values(call: Call, inputs: _Inputs, atom, padded: bool):
    """Reads the values of an atom: slots × D, or D × slots."""
    i, at, size = atom
    dtype, D = call.problem.dtype, call.problem.sizes.D
    source, axis = (inputs.values or inputs.keys)[i], int(call.turned)
    some = slice(at, at + size)
    value = source[0, 0, :D, some] if call.turned else source[0, 0, some, :]
    value = slots.numbers(value, dtype)
    if not padded:
        return value
    place = at + lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    inside = spread(place < _left(call, i), value.shape)
    return jnp.where(inside, value.astype(jnp.float32), 0).astype(dtype)


def _left(call: Call, piece: int) -> int:
    """Counts the slots of a piece of the last block that are there."""
    return call.cut.slots - (call.cut.blocks - 1) * call.cut.size - piece * call.cut.piece


def _scales(refs: list, part: Part):
    """Reads the scales of the current head, 1 × slots; None where numbers are exact."""
    if not refs:
        return None
    k = pl.ds(pl.program_id(1), 1)
    return _joined([refs[i][0, k, at : at + n] for i, at, n in part.atoms])


def _joined(arrays: list):
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)
