"""Attention by kernels for NVIDIA GPUs: forward and backward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.blocks.kinds import cut_last
from jattn.call.problem import Operands, Problem
from jattn.implementations import joint, nvidia
from jattn.implementations.gpu import finite, layout
from jattn.implementations.gpu.cotangents import (
    largest,
    of_operands,
    representable,
    room,
    share_kernel,
)
from jattn.implementations.gpu.refusal import HOPPER, refusal
from jattn.implementations.kernel import Kernel
from jattn.implementations.sums import Sums

# With fewer, most rows of a block are padding, and most of the GPU has nothing to do. For
# 16 heads and 8192 keys the kernel takes 0.25 ms for 1 to 128 queries, and blockwise 0.06
# for one query, 0.19 for 32, and 0.26 for 128 (H200).
FEW_QUERIES = 32


@dataclasses.dataclass(frozen=True)
class GPU(Kernel):
    """Forward and backward by Pallas kernels for Hopper, Ampere and Ada.

    Attributes:
        interpret: How the kernels are emulated, which works on any platform; for tests.
        capability: The compute capability of the device; by default that of the device
            that is here, or Hopper's where none is.
    """

    interpret: Any = None
    capability: str | None = None
    isolates = True

    @property
    def _is_hopper(self) -> bool:
        return (self.capability or nvidia.capability() or HOPPER) == HOPPER

    @property
    def _limits(self) -> layout.Limits:
        return layout.HOPPER if self._is_hopper else layout.AMPERE

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why no kernel can be written for a problem, or run; None if it can."""
        return refusal(problem, platform, is_emulated=bool(self.interpret))

    def leaves(self, problem: Problem) -> str | None:
        """Says why it leaves a problem to others that compute it, unless it is named."""
        if nvidia.capability() != HOPPER:
            return (
                f"is chosen by itself on compute capability {HOPPER} only, that of Hopper, "
                f"where it was measured."
            )
        if problem.sizes.T < FEW_QUERIES:
            return (
                f"leaves fewer than {FEW_QUERIES} queries to others: its blocks have "
                f"{layout.BLOCK}."
            )
        return None

    def block_sizes(self, problem, operands, platform) -> tuple[int, int]:
        """Gives the queries and keys of a block that forward can skip."""
        del operands, platform
        plan = layout.forward_plan(problem.sizes.H, problem.sizes.D, self._limits)
        return layout.BLOCK, plan.inner

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes output, maximum and sum of each row."""
        from jattn.implementations.gpu.forward import forward, of_logits

        sizes = problem.sizes
        plan = layout.forward_plan(sizes.H, sizes.D, self._limits)
        call, arguments = self._call(problem, finite.of_forward(problem, operands), plan)
        output, top, total = forward(call, arguments)
        output = output[:, : sizes.T, :, : sizes.D]
        _, _, unit = layout.numbers(problem, operands)
        top, total = (layout.unrows(x, sizes.T) for x in (top, total))
        return Sums(output, *of_logits(top, total, unit))

    def backward(self, problem, operands, outputs, cotangents, wanted) -> Operands | None:
        """Computes the cotangents of the operands; None if a kernel cannot.

        The kernels write no cotangent as large as T × S. Those for Ampere and Ada have no
        room for heads with H + D > 256.
        """
        from jattn.implementations.gpu.backward import row_numbers

        sizes = problem.sizes
        if layout.backward_plan(sizes.H, sizes.D, self._limits) is None:
            return None
        _, read = layout.read(problem, operands)
        flags = joint.wanted_extras(read, wanted)
        leaves = zip(*map(jax.tree.leaves, (read, flags)), strict=True)
        if any(flag and layout.form(x) == "tile" for x, flag in leaves):
            return None
        factor, cotangents = representable(problem, cotangents)
        narrow = cotangents.output.astype(problem.dtype)
        d_output = narrow.astype(problem.wide)
        cotangents = cotangents._replace(output=d_output)
        _, _, unit = layout.numbers(problem, operands)
        rows = row_numbers(problem, unit, outputs, cotangents, largest(operands.value))
        growth, rows = room(problem, operands, rows, outputs, cotangents)
        narrow = finite.cleaned(problem, narrow)
        operands = finite.of_backward(problem, operands)
        # Rows of padding have the level ∞, so that their weights are 0.
        vectors = tuple(map(layout.rows, rows, (0, jnp.inf, 0, 0)))
        gradient = functools.partial(
            self._gradient, problem, operands, (narrow, vectors, flags)
        )
        d_query, *d_rows = gradient(("query",))
        parts = (
            [("key", "value")]
            if share_kernel(problem, operands)
            else [("key",), ("value",)]
        )
        found = [gradient(sums) for sums in parts]
        pairs = zip(found, parts, strict=True)
        d_key, d_value = (x for one, sums in pairs for x in one[: len(sums)])
        d_columns = found[0][len(parts[0]) :]
        # One after the other: their product may be ∞ or 0 where no result is.
        grown = lambda tree: jax.tree.map(lambda x: x * growth * factor, tree)
        results = *grown((d_query, d_key)), d_value * factor, *grown((d_rows, d_columns))
        return of_operands(problem, operands, results, flags, wanted)

    def _gradient(self, problem, operands, given, sums):
        """Runs the kernel for these sums."""
        from jattn.implementations.gpu.backward import backward

        narrow, vectors, flags = given
        plan = layout.backward_plan(problem.sizes.H, problem.sizes.D, self._limits)
        by_query = sums == ("query",)
        call, arguments = self._call(problem, operands, plan, by_query, backward=True)
        (query, key, value), narrow = arguments.inputs, layout.padded(narrow)
        inputs = (query, narrow, key, value) if by_query else (key, value, query, narrow)
        if sums == ("value",):
            inputs = key, query, narrow
        arguments = arguments._replace(inputs=inputs, vectors=vectors)
        return backward(call, sums, flags, arguments)

    def _call(self, problem: Problem, operands, plan, by_query=True, backward=False):
        """Makes the call of a kernel, and its arguments: queries, keys and values."""
        from jattn.implementations.gpu.call import Arguments, Call
        from jattn.implementations.gpu.mma import Mma
        from jattn.implementations.gpu.schedule import schedule
        from jattn.implementations.gpu.wgmma import Wgmma

        pairs, read = layout.read(problem, operands)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
        counts = operands.query_position is None
        machine = (Wgmma if self._is_hopper else Mma)(self.interpret)
        call = Call(problem, plan, pairs, shapes, by_query, counts, machine, backward)
        blocks = (layout.BLOCK, plan.inner)
        kinds = joint.block_kinds(problem, operands, blocks if by_query else blocks[::-1])
        if call.hides_queries:
            kinds = cut_last(kinds.swapaxes(2, 3)).swapaxes(2, 3)
        if not by_query:
            kinds = kinds.swapaxes(2, 3)
        sign, numbers, _ = layout.numbers(problem, operands)
        query = operands.query * sign.astype(problem.dtype)
        inputs = tuple(map(layout.padded, (query, operands.key, operands.value)))
        extras = jax.tree.map(lambda x: layout.arrange(x, by_query), read)
        return call, Arguments(schedule(kinds), numbers, inputs, (), extras)
