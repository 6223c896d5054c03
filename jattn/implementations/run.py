"""A call of the attention operation, with or without kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.attention import Attention
from jattn.implementations.blockwise.plan import flat_logits, plan, without_bands
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.kernel import Kernel, Plain
from jattn.implementations.sums import Sums


class Blockwise(Plain):
    """Attention tile by tile, in plain JAX; it computes whatever a kernel cannot."""

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Refuses nothing, on any platform."""
        del problem, platform

    def block_sizes(self, problem, operands, platform) -> tuple[int, int]:
        """Gives the number of queries and of keys in a cell, the unit of skipping."""
        del operands
        options: dict[str, Any] = {"spread": False, "flat": flat_logits(platform)}
        T, S = plan(problem, **options).cell
        # A table of all small tiles of a window takes seconds and gigabytes beyond this.
        if problem.near and problem.sizes.T * problem.sizes.S > 2**24 * T * S:
            return without_bands(problem, **options).cell
        return T, S

    def attend(self, problem: Problem, operands: Operands) -> Sums:
        """Computes it without any kernel."""
        return attend(problem, operands)


def attend(
    problem: Problem,
    operands: Operands,
    kernels: tuple[Kernel, ...] = (),
    tile: tuple[int, int] | None = None,
    flat: int | None = None,
    apart: bool = False,
) -> Sums:
    """Computes the output BTND and the sums of each row BTN, in the wide precision.

    The first of `kernels` that accepts the platform of compilation runs; blockwise runs if
    none does. `tile` gives the number of queries and of keys in a blockwise tile; it
    replaces the measured rule. `flat` asks for the loop of a GPU on every platform, with so
    many logits in a tile at most; 0 for the loops of a CPU. With `apart` no heads are
    folded, for callers that compute the logits again: these have to fit the sums.
    """
    if problem.sizes.are_nothing:
        return _nothing(problem)
    own, here = (x for x in kernels if x.sets_blocks), jax.default_backend()
    blocks = next((x.block_sizes(problem, None, here) for x in own), None)
    problem, operands = prepare(problem, operands, tile, blocks)
    leaves, tree = jax.tree.flatten(operands)
    return Sums(*Attention(problem, tree, tile, kernels, flat, apart=apart)(*leaves))


def _nothing(problem: Problem) -> Sums:
    """Gives the sums of queries without keys, all of them 0."""
    B, N, T, _ = problem.sizes.BNTS
    zeros = lambda *shape: jnp.zeros(shape, problem.wide)
    return Sums(zeros(B, T, N, problem.sizes.D), zeros(B, T, N), zeros(B, T, N))
