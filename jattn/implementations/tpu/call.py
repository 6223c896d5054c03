"""One call of a kernel: its static facts, and how its operands are cut into blocks."""

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
from jattn.implementations.tpu import schedule
from jattn.implementations.tpu.layout import Extras, Pairs, Plan, kind
from jattn.implementations.tpu.schedule import blocks

# Keys and columns of a part of a block: those with the fewest bundles (`bench/tpu.md`).
_USUAL, _FIFTH_GENERATION = (256, 512), (128, 256)


def counted_tuning(problem: Problem, shapes: Extras, forward: bool) -> tuple[int, int]:
    """How many keys and columns a part of a block has, for the chip compiled for."""
    try:
        generation = pltpu.get_tpu_info().generation
    except ValueError:  # no chip is known, as in an export or where it is emulated
        return _USUAL
    columns = any(kind(x) == "column" for x in jax.tree.leaves(shapes))
    small = forward and problem.sizes.H > 64 and problem.modifier is None and not columns
    return _FIFTH_GENERATION if small and generation == 5 else _USUAL


class Arguments(NamedTuple):
    """What a kernel takes; all but `count` and `numbers` begin with examples and heads.

    Attributes:
        words: The schedule: examples × heads × steps.
        count: How many of the steps there are.
        numbers: What products are scaled by, exponents of 2, and maxima.
        inputs: Queries, keys, values and what is like them.
        extras: What masks and the like read.
    """

    words: jax.Array
    count: jax.Array
    numbers: jax.Array
    inputs: tuple[jax.Array, ...]
    extras: Extras


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel is written for; examples and heads are those that its arrays have.

    Attributes:
        problem: The call.
        plan: Its blocks.
        pairs: What joins a query and a key.
        shapes: The `Extras` before they were arranged, as types.
        by_query: Whether the outer blocks of the schedule are of queries.
        count: How many steps there are, where that is known.
        tuning: How many keys and columns a part of a block has.
        interpret: Whether and how it is emulated.
        leading: Examples and heads.
        shared: How many heads read one key/value head.
        varying: Which axes of a `shard_map` the arrays differ over.
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
        """The call for these arrays, which may be one device's part of them."""
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
        """The type of a result: a shape for each example and head."""
        return jax.ShapeDtypeStruct(
            (*self.leading, *shape), dtype, manual_axis_type=self.varying
        )

    @property
    def has_padding(self) -> bool:
        """Whether the last block of keys has keys that are none."""
        return self.plan.keys * self.plan.block_kv != self.problem.sizes.S

    @property
    def precision(self):
        """Of products: all bits of float32."""
        exact = self.problem.dtype == jnp.float32
        return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def word(self, words):
        """The present step."""
        b, k, step = (pl.program_id(axis) for axis in range(3))
        return words[self._at(b, k, step)]

    def over_kinds(self, word, block) -> None:
        """Runs `block(masked)`, or `block(masked, half)`, unless the step's is empty."""
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
        B, K, steps = self.steps
        return ((b if B > 1 else 0) * K + (k if K > 1 else 0)) * steps + step

    def spec(self, shape, at):
        """Blocks of a shape at `at(b, k, query block, key block)`."""

        def index(b, k, step, words, *_):
            outer, inner = blocks(words[self._at(b, k, step)])
            return at(b, k, *((outer, inner) if self.by_query else (inner, outer)))

        return pl.BlockSpec(shape, index)

    def query_spec(self, size: int):
        """Of B × heads × size × columns."""
        shape = (1, 1, size, self.plan.columns)
        return self.spec(shape, lambda b, k, i, j: (b, k, 0, i))

    def key_spec(self, size: int, transposed=False):
        """Of B × K × S × size, or of B × K × size × S."""
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
        """Of each array that masks and the like read."""
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
        """Runs a kernel over the schedule; specs are of the inputs and extras."""
        grid = {x: options.pop(x) for x in ("out_specs", "scratch_shapes")}
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
