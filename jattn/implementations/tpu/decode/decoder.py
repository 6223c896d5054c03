"""A few queries by a cache on TPU, as one function; and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.call.problem import Operands, Problem
from jattn.implementations import joint
from jattn.implementations.sums import Sums
from jattn.implementations.tpu.decode import rows, slots, steps
from jattn.implementations.tpu.decode.slots import LANES, Slots
from jattn.implementations.tpu.kernel import factors
from jattn.implementations.tpu.pairs import objection
from jattn.implementations.tpu.schedule import shared

MOST_HEAD = 576  # the size of a latent vector with its rotary key
MOST_ROWS = 512  # of one key head; more are a prompt, which is no matter of bandwidth
# Logits computed together, in registers of 1024 numbers each: half of the 64.
LOGITS = 32 * 1024
# Words in the memory of scalars, 4 bytes each, for the steps and the table of pages.
MOST_WORDS = 2**16


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A few queries by the slots of a cache, by a Pallas kernel.

    Attributes:
        most_slots: How many slots a step may read.
        interpret: Whether the kernel is emulated, which works on any platform; for tests.
    """

    most_slots: int = slots.MOST_SLOTS
    interpret: Any = False

    def runs_on(self, platform: str) -> bool:
        """Says whether it can run on a platform."""
        return platform == "tpu" or bool(self.interpret)

    def refusal(self, problem: Problem, cache: Slots, dtype: str) -> str | None:
        """Says why it cannot attend to a cache whose numbers are of `dtype`."""
        sizes = problem.sizes
        if problem.dtype.name not in ("bfloat16", "float32"):
            return f"takes bfloat16 and float32, which TPUs multiply, got {problem.dtype}."
        if not all(isinstance(size, int) for size in (*sizes.BNTS, sizes.K)):
            return "needs sizes that are numbers; these are symbols."
        if max(sizes.H, sizes.D) > MOST_HEAD:
            return f"takes head sizes up to {MOST_HEAD}, got H={sizes.H} and D={sizes.D}."
        if sizes.G * sizes.T > MOST_ROWS:
            return (
                f"takes up to {MOST_ROWS} rows of a key head, got {sizes.T} queries of "
                f"{sizes.G} heads each."
            )
        cut = slots.cut_of(cache, sizes.S, self.most_slots)
        page = None if cache.table is None else cut.piece
        words = sizes.B * (sizes.K * cut.blocks if page is None else sizes.S // page)
        if words > MOST_WORDS:
            return f"has room for {MOST_WORDS} blocks or pages, got {words}."
        found = slots.objection(dtype, page)
        return found or joint.objection_to_programs(problem, objection)

    def forward(self, problem: Problem, operands: Operands, cache: Slots) -> Sums:
        """Computes output, maximum and sum of each row."""
        from jattn.implementations.tpu.decode.kernel import Arguments, Call, run

        sizes = problem.sizes
        cut = slots.cut_of(cache, sizes.S, self.most_slots)
        cache, turned = slots.as_read(cache)
        pairs, read = joint.extras(problem, operands)
        words, count = steps.steps(_kinds(problem, operands, cut))
        known = count if isinstance(count, int) else None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
        width = max(LOGITS // (sizes.G * sizes.T) // LANES * LANES, LANES)
        static = cut, width, turned, pairs, shapes, words.shape, known, self.interpret
        factor, numbers = factors(problem, operands)
        query = operands.query * factor.astype(problem.dtype)
        pages = jnp.zeros(1, jnp.int32) if cache.table is None else cache.table
        arguments = Arguments(
            words.reshape(-1),
            jnp.maximum(pages, 0).reshape(-1),  # −1, no page, is that of an empty block
            numbers,
            rows.queries(query, sizes),
            cache,
            jax.tree.map(lambda x: rows.arrange(x, sizes), read),
        )
        count = jnp.asarray(count, jnp.int32)
        output, top, total = run(Call(problem, *static), arguments, count)
        top, total = top[..., 0], total[..., 0]
        return Sums(*(rows.unqueries(x, sizes) for x in (output, top, total)))


def _kinds(problem: Problem, operands: Operands, cut):
    """Gives the kind of each block, B or 1 × K or 1 × blocks."""
    sizes = problem.sizes
    kinds = joint.block_kinds(problem, operands, (sizes.T, cut.size))
    kinds = shared(np if isinstance(kinds, np.ndarray) else jnp, kinds, sizes.K)
    return kinds[:, :, 0]
