"""One call of a kernel: its arrays, the shape of its results, and its memory."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.call.problem import Problem
from jattn.implementations.gpu.layout import BLOCK, Plan
from jattn.implementations.gpu.machine import Machine
from jattn.implementations.gpu.program import run_program
from jattn.implementations.gpu.schedule import Steps
from jattn.implementations.joint import Extras, Pairs


class Arguments(NamedTuple):
    """Arguments of a kernel.

    Attributes:
        steps: The schedule.
        numbers: The factors of products and of exponents of 2.
        inputs: B × length × heads × size: what the rows of tiles read, then the blocks.
        vectors: B × N × T in float32: numbers of each query, in backward.
        extras: The arrays that masks, modifiers, bias and dropout read.
    """

    steps: Steps
    numbers: jax.Array
    inputs: tuple[jax.Array, ...]
    vectors: tuple[jax.Array, ...]
    extras: Extras


@dataclasses.dataclass(frozen=True)
class Call:
    """The static description of a call.

    Attributes:
        problem: The call.
        plan: The sizes of its blocks.
        pairs: The programs that join a query and a key.
        shapes: The types of the `Extras` before they were arranged.
        by_query: Whether the rows of tiles are queries; if not, they are keys.
        counts_queries: Whether the positions of queries are 0, 1, 2, …
        machine: The device or its emulator.
        is_backward: Whether it computes cotangents, which padded queries must not reach.
    """

    problem: Problem
    plan: Plan
    pairs: Pairs
    shapes: Extras
    by_query: bool
    counts_queries: bool
    machine: Machine
    is_backward: bool

    @property
    def own_form(self) -> str:
        """Says which arrays belong to the rows of tiles."""
        return "row" if self.by_query else "column"

    @property
    def has_padding(self) -> bool:
        """Says whether the last block of keys is partly padding."""
        size = self.plan.inner if self.by_query else BLOCK
        return self.problem.sizes.S % size != 0

    @property
    def hides_queries(self) -> bool:
        """Says whether padded queries are hidden: a modifier may be NaN or ∞ there."""
        size = BLOCK if self.by_query else self.plan.inner
        return self.is_backward and self.problem.sizes.T % size != 0

    @property
    def is_masked(self) -> bool:
        """Says whether some tiles need a mask."""
        return self.problem.mask is not None or self.has_padding or self.hides_queries

    @property
    def has_logits(self) -> bool:
        """Says whether the logits are other than the scaled products."""
        return self.problem.modifier is not None or self.shapes.bias is not None

    def run(self, kernel: Callable, arguments: Arguments, own: int, results, name: str):
        """Runs a kernel on all rows of all heads.

        Args:
            kernel: What a computing group does: a function of its `Context`, which gives a
                function of the results' memory.
            arguments: The arguments; the first `own` inputs are read by the rows of tiles.
            own: How many.
            results: For each result its shape after B: it has N heads, as queries have.
            name: A name for profiles.
        """
        B, length = arguments.inputs[0].shape[:2]
        varying = jax.typeof(arguments.inputs[0]).manual_axis_type
        types = [
            jax.ShapeDtypeStruct((B, *shape), jnp.float32, manual_axis_type=varying)
            for shape in results
        ]
        # The copies of Ampere take rows of all heads, and cut a head out of them.
        flat = tuple(x.reshape(*x.shape[:2], -1) for x in arguments.inputs)
        leaves, tree = jax.tree.flatten(arguments._replace(inputs=flat))

        def entry(*refs):
            given = tree.unflatten(refs[: len(leaves)])
            outputs = refs[len(leaves) :]
            pl.run_scoped(
                lambda *memory: run_program(self, kernel, given, own, outputs, memory),
                *self.machine.memory(self, arguments, own),
                collective_axes="group",
            )

        entry.__name__ = name
        run = plgpu.kernel(
            entry,
            out_type=types,
            grid=(self.problem.sizes.N, length // BLOCK, B),
            grid_names=("head", "block", "example"),
            num_threads=self.machine.threads,
            thread_name="group",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.machine.interpret,
        )
        return self.machine.call(run, types, leaves)
