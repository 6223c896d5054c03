"""Attention by kernels for TPU: forward and backward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.call.problem import Operands, Problem
from jattn.implementations import joint
from jattn.implementations.kernel import Kernel
from jattn.implementations.shared import isolate, row_numbers, sum_all
from jattn.implementations.sums import Sums
from jattn.implementations.tpu import layout
from jattn.implementations.tpu.layout import LOG2_E
from jattn.implementations.tpu.pairs import objection
from jattn.implementations.tpu.schedule import MOST_INNER

BLOCKS = (512, 512)  # columns and keys of a block of the table
# Largest d_query kept in VMEM, in bytes; it is double-buffered, so VMEM needs twice this.
RESIDENT = 16 * 2**20


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    sizes = problem.sizes
    if problem.dtype.name not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, which TPUs multiply, got {problem.dtype}."
    found = joint.objection_to_sizes(problem)
    if found:
        return found
    block_q, block_kv = _block_sizes(problem, BLOCKS)
    if MOST_INNER * block_q < sizes.T or MOST_INNER * block_kv < sizes.S:
        return f"takes up to {MOST_INNER} blocks of 512, got T={sizes.T} and S={sizes.S}."
    return joint.objection_to_programs(problem, objection)


def _block_sizes(problem: Problem, blocks: tuple[int, int]) -> tuple[int, int]:
    """Gives the queries and keys of a block that can be skipped, if heads are folded."""
    plan = layout.plan(problem.sizes, True, blocks)
    return plan.block_q, plan.block_kv


@dataclasses.dataclass(frozen=True)
class TPU(Kernel):
    """Forward and backward by Pallas kernels.

    Attributes:
        blocks: The number of columns and of keys in a block.
        tuning: The number of keys and of columns in a part of a block; replaces the
            choice of `counted_tuning`.
        interpret: Whether the kernels are emulated, which works on any platform; for tests.
        resident: How many bytes of the cotangents of queries one kernel may hold.
    """

    blocks: tuple[int, int] = BLOCKS
    tuning: tuple[int, int] | None = None
    interpret: Any = False
    resident: int = RESIDENT

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why no kernel can be written for a problem; None if one can."""
        if platform != "tpu" and not self.interpret:
            return f"runs on TPU only, and the platform is {platform}."
        return _objection(problem)

    def block_sizes(self, problem, operands, platform) -> tuple[int, int]:
        """Gives the queries and keys of a block that it can skip, if heads are folded."""
        del operands, platform
        return _block_sizes(problem, self.blocks)

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes output, maximum and sum of each row."""
        from jattn.implementations.tpu.forward import forward

        call, arguments = self._call(problem, operands, by_query=True)
        plan, sizes = call.plan, problem.sizes
        query, key, value = arguments.inputs
        # The forward kernel reads values transposed, B × K × D × S.
        arguments = arguments._replace(inputs=(query, key, jnp.swapaxes(value, 2, 3)))
        output, top, total = forward(call, arguments)
        return Sums(
            layout.unqueries(output, plan, sizes, (sizes.D,)),
            layout.unqueries(top, plan, sizes, ()),
            layout.unqueries(total, plan, sizes, ()),
        )

    def backward(self, problem, operands, outputs, cotangents, wanted) -> Operands | None:
        """Computes the cotangents of the operands; None if one of them is for each pair.

        The kernel has no memory for a cotangent as large as T × S.
        """
        from jattn.implementations.tpu.segments import in_segments

        call, arguments = self._call(problem, operands, by_query=False)
        plan = call.plan
        flags = joint.wanted_extras(call.shapes, wanted)
        if any(
            flag and joint.kind(x) == "tile"
            for x, flag in zip(*map(jax.tree.leaves, (call.shapes, flags)), strict=True)
        ):
            return None
        sizes, wide = problem.sizes, problem.wide
        narrow = cotangents.output.astype(problem.dtype)
        # Rounded for δ as well, which is subtracted from the kernel's v · d_output.
        cotangents = cotangents._replace(output=narrow.astype(wide))
        numbers = jnp.stack(row_numbers(outputs, cotangents), axis=-1)
        rows = (
            layout.queries(narrow, plan),
            layout.queries(numbers, plan),
        )
        arguments = arguments._replace(inputs=(*arguments.inputs, *rows))
        d_query, d_key, d_value, *d_read = in_segments(call, flags, arguments)
        d_query = layout.unqueries(d_query, plan, sizes, (sizes.H,))
        finite, _ = isolate(operands.query)
        arrange = functools.partial(layout.arrange, plan=plan)
        d_modifier, d_bias = joint.read_cotangents(
            problem, operands, flags, d_read, arrange
        )
        nothing = jax.tree.map(lambda _: None, wanted)
        # The kernel gives Σₛ d_logitₛ kₛ for each query q. From it
        #     d_q = scale · Σₛ d_logitₛ kₛ        d_scale = Σ q · Σₛ d_logitₛ kₛ
        # Its d_key has only a part of the scale; `numbers[0]` is the rest, see `factors`.
        return nothing._replace(
            query=d_query * operands.scale,
            key=layout.unkeys(d_key, sizes) * arguments.numbers[0],
            value=layout.unkeys(d_value, sizes),
            scale=sum_all(d_query * finite.astype(wide)),
            bias=d_bias,
            modifier=d_modifier,
        )

    def _call(self, problem: Problem, operands: Operands, by_query: bool):
        """Makes the call of a kernel, and its arguments: queries, keys and values."""
        from jattn.implementations.tpu.call import Arguments, Call, counted_tuning
        from jattn.implementations.tpu.schedule import schedule

        pairs, read = joint.extras(problem, operands)
        plan = layout.plan(problem.sizes, layout.folds(read), self.blocks)
        segments = 1 if by_query else self._segments(problem, plan)
        # The number of query blocks is rounded up to whole segments.
        plan = plan._replace(queries=-(-plan.queries // segments) * segments)
        kinds = _kinds(problem, operands, plan)
        if by_query:
            plan = plan.joined
            words, count = schedule(kinds, plan.heads, plan.halves)
        else:  # B × N × i × j to (segments · B) × N × j × i: outer blocks are of keys
            B, N, i, j = kinds.shape
            kinds = kinds.reshape(B, N, segments, i // segments, j)
            kinds = kinds.transpose(2, 0, 1, 4, 3).reshape(-1, N, j, i // segments)
            words, count = schedule(kinds, plan.heads)
            words = words.reshape(segments, B, *words.shape[1:])
        known = count if isinstance(count, int) else None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
        tuning = self.tuning or counted_tuning(problem, shapes, by_query)
        static = plan, pairs, shapes, by_query, known, tuning, self.interpret
        factor, numbers = factors(problem, operands)
        inputs = (
            layout.queries(operands.query * factor.astype(problem.dtype), plan),
            layout.keys(operands.key, plan),
            layout.keys(operands.value, plan),
        )
        arranged = jax.tree.map(lambda x: layout.arrange(x, plan), read)
        count = jnp.asarray(count, jnp.int32)
        return Call(problem, *static), Arguments(words, count, numbers, inputs, arranged)

    def _segments(self, problem: Problem, plan) -> int:
        """Computes how many kernels it takes to hold a head's cotangents of queries."""
        block = 4 * problem.sizes.H * plan.columns  # bytes of float32 for one block
        return -(-plan.queries // max(self.resident // block, 1))


def _kinds(problem: Problem, operands: Operands, plan):
    """Gives the kind of each block; the last keys are partial if some are padding."""
    kinds = joint.block_kinds(problem, operands, (plan.block_q, plan.block_kv))
    xp = np if isinstance(kinds, np.ndarray) else jnp
    more = plan.queries - kinds.shape[2]  # empty blocks that fill up the last segment
    return xp.pad(kinds, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else kinds


def factors(problem: Problem, operands: Operands):
    """Computes the factors of queries, products, exponents of 2 in forward, and maxima.

    The scale is split. In float32 all of it multiplies the queries, as in blockwise. In
    bfloat16 that would round the queries, so only the sign of the scale multiplies them;
    the sign makes the largest product the largest logit. The size of the scale multiplies
    the products, or the exponents of a forward pass without modifier and bias.

    Maxima are multiplied by the same number by which backward multiplies products. So
    backward computes exactly the logits to which the maximum belongs.
    """
    scale = operands.scale
    if problem.dtype == jnp.float32:
        return scale, jnp.array([1, LOG2_E, 1], scale.dtype)
    sign, size = jnp.sign(scale), jnp.where(scale == 0, 1, jnp.abs(scale))
    plain = problem.modifier is None and operands.bias is None
    exponent = size if plain else jnp.ones_like(size)
    return sign, jnp.stack([size, exponent * LOG2_E, exponent])
