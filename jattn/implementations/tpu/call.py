"""One call of a kernel: what is known at compile time, and how operands become blocks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattn.blocks.kinds import EMPTY, FULL, PARTIAL
from jattn.call.problem import Problem
from jattn.implementations.joint import Extras, Pairs, kind
from jattn.implementations.tpu import schedule
from jattn.implementations.tpu.layout import Plan
from jattn.implementations.tpu.schedule import blocks

# Keys and columns of a part of a block: the sizes that compile to the fewest bundles of
# instructions (`bench/tpu.md`).
_USUAL, _FIFTH_GENERATION = (256, 512), (128, 256)


def counted_tuning(problem: Problem, shapes: Extras, forward: bool) -> tuple[int, int]:
    """Gives the keys and columns of a part of a block, for the chip to compile for."""
    try:
        generation = pltpu.get_tpu_info().generation
    except ValueError:  # no chip is known: an export, or an emulated kernel
        return _USUAL
    columns = any(kind(x) == "column" for x in jax.tree.leaves(shapes))
    small = forward and problem.sizes.H > 64 and problem.modifier is None and not columns
    return _FIFTH_GENERATION if small and generation == 5 else _USUAL


class Arguments(NamedTuple):
    """Arguments of a kernel; all but `count` and `numbers` begin with examples and heads.

    Attributes:
        words: The schedule: examples × heads × steps.
        count: How many of the steps to run.
        numbers: The factors of products, of exponents of 2, and of maxima.
        inputs: Queries, keys, values, and in backward the arrays of rows.
        extras: The arrays that masks, modifiers, bias and dropout read.
    """

    words: jax.Array
    count: jax.Array
    numbers: jax.Array
    inputs: tuple[jax.Array, ...]
    extras: Extras


@dataclasses.dataclass(frozen=True)
class Call:
    """The static description of a call; examples and heads are those of its arrays.

    Attributes:
        problem: The call.
        plan: Its blocks.
        pairs: The programs that join a query and a key.
        shapes: The types of the `Extras` before they were arranged.
        by_query: Whether the outer blocks of the schedule are blocks of queries.
        count: The number of steps, if it is known.
        tuning: The number of keys and of columns in a part of a block.
        interpret: Whether and how the kernel is emulated.
        leading: The number of examples and of heads.
        shared: How many heads read one key/value head.
        varying: The axes of a `shard_map` along which the arrays differ.
        steps: The shape of the schedule: examples, heads, steps.
    """

    problem: Problem
    plan: Plan
    pairs: Pairs
    shapes: Extras
    by_query: bool
    count: int | None
    tuning: tuple[int, int]
    interpret: Any
    leading: tuple[int, ...] = ()
    shared: int = 1
    steps: tuple[int, ...] = ()
    varying: Any = None

    def of(self, arguments: "Arguments") -> "Call":
        """Fits the call to these arrays, which may be the part of one device."""
        query, key, *_ = arguments.inputs
        leading = query.shape[:2]
        return dataclasses.replace(
            self,
            leading=leading,
            shared=leading[1] // key.shape[1],
            steps=arguments.words.shape,
            varying=jax.typeof(query).manual_axis_type,
        )

    def result(self, shape, dtype=jnp.float32):
        """Gives the type of a result that has this shape for each example and head."""
        return jax.ShapeDtypeStruct(
            (*self.leading, *shape), dtype, manual_axis_type=self.varying
        )

    @property
    def has_padding(self) -> bool:
        """Says whether the last block of keys is partly padding."""
        return self.plan.keys * self.plan.block_kv != self.problem.sizes.S

    @property
    def precision(self):
        """Gives the precision of products: all bits of float32 if inputs are float32."""
        exact = self.problem.dtype == jnp.float32
        return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def word(self, words):
        """Reads the word of the current step."""
        b, k, step = (pl.program_id(axis) for axis in range(3))
        return words[self._at(b, k, step)]

    def over_kinds(self, word, block) -> None:
        """Runs `block(masked)`, or `block(masked, half)`, unless the block is empty."""
        kind = schedule.kind(word)
        if self.problem.mask is None and not self.has_padding:
            pl.when(kind != EMPTY)(lambda: block(masked=False))
            return
        pl.when(kind == FULL)(lambda: block(masked=False))
        pl.when(kind == PARTIAL)(lambda: block(masked=True))
        if self.plan.halves > 1:
            half = kind - schedule.HALF
            pl.when(half >= 0)(lambda: block(masked=True, half=half))

    def _at(self, b, k, step):
        # A schedule with one example or one head serves all of them.
        B, K, steps = self.steps
        return ((b if B > 1 else 0) * K + (k if K > 1 else 0)) * steps + step

    def spec(self, shape, at):
        """Makes the spec of blocks of a shape at `at(b, k, query block, key block)`."""

        def index(b, k, step, words, *_):
            outer, inner = blocks(words[self._at(b, k, step)])
            return at(b, k, *((outer, inner) if self.by_query else (inner, outer)))

        return pl.BlockSpec(shape, index)

    def query_spec(self, size: int):
        """Makes the spec of an array B × heads × size × columns."""
        shape = (1, 1, size, self.plan.columns)
        return self.spec(shape, lambda b, k, i, j: (b, k, 0, i))

    def key_spec(self, size: int, transposed=False):
        """Makes the spec of an array B × K × S × size, or B × K × size × S."""
        shared = self.plan.heads // self.problem.sizes.K
        kv = self.plan.block_kv
        if transposed:
            return self.spec(
                (1, 1, size, kv), lambda b, k, i, j: (b, lax.div(k, np.int32(shared)), 0, j)
            )
        return self.spec(
            (1, 1, kv, size), lambda b, k, i, j: (b, lax.div(k, np.int32(shared)), j, 0)
        )

    def extra_specs(self, arranged: Extras) -> Extras:
        """Makes the spec of each array of the extras."""
        return jax.tree.map(self._extra_spec, arranged, self.shapes)

    def _extra_spec(self, array, like):
        B, K = array.shape[:2]
        columns, kv = self.plan.columns, self.plan.block_kv
        head = lambda b, k: (b if B > 1 else 0, k if K > 1 else 0)
        what = kind(like)
        if what == "tile":
            at = lambda b, k, i, j: (*head(b, k), j, i)
            return self.spec((1, 1, kv, columns), at)
        if what == "column":
            return self.spec((1, 1, 1, kv), lambda b, k, i, j: (*head(b, k), 0, j))
        many = like.shape[2] > 1
        at = lambda b, k, i, j: (*head(b, k), 0, i if many else 0)
        return self.spec((1, 1, 1, columns), at)

    def run(
        self, kernel, arguments: "Arguments", specs, *, name, semantics, vmem, **options
    ):
        """Runs a kernel over the schedule, with the specs of inputs and extras."""
        grid = {x: options.pop(x) for x in ("out_specs", "scratch_shapes")}
        # The grid has a traced size where the number of steps is not known.
        count = arguments.count if self.count is None else self.count
        return pl.pallas_call(
            kernel,
            name=name,
            interpret=self.interpret,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(*self.leading, count),
                in_specs=jax.tree.leaves(specs, is_leaf=_is_spec),
                **grid,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=vmem
            ),
            **options,
        )(
            arguments.words.reshape(-1),
            arguments.numbers,
            *arguments.inputs,
            *jax.tree.leaves(arguments.extras),
        )


def _is_spec(x: Any) -> bool:
    return isinstance(x, pl.BlockSpec)
