"""A call of the attention operation, with or without kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.attention import Attention
from jattn.implementations.blockwise.plan import flat_logits, plan, without_bands
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.kernel import (
    Kernel,
    Plain,
)
from jattn.state import State


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

    def attention_state(self, problem: Problem, operands: Operands) -> State:
        """Computes the state without any kernel."""
        return attention_state(problem, operands)


def attention_state(
    problem: Problem,
    operands: Operands,
    kernels: tuple[Kernel, ...] = (),
    tile: tuple[int, int] | None = None,
    flat: int | None = None,
) -> State:
    """Computes the output BTND in the wide precision, and the logsumexp BTN.

    The first of `kernels` that accepts the platform of compilation runs; blockwise runs if
    none does. `tile` gives the number of queries and of keys in a blockwise tile; it
    replaces the measured rule. `flat` asks for the loop of a GPU on every platform, with so
    many logits in a tile at most; 0 for the loops of a CPU.
    """
    if problem.sizes.are_nothing:
        return _nothing(problem)
    own, here = (x for x in kernels if x.sets_blocks), jax.default_backend()
    blocks = next((x.block_sizes(problem, None, here) for x in own), None)
    problem, operands = prepare(problem, operands, tile, blocks)
    leaves, tree = jax.tree.flatten(operands)
    return state_of(*Attention(problem, tree, tile, kernels, flat)(*leaves))


def state_of(output, top, total) -> State:
    """Makes the state from the outputs of `Attention`: logsumexp = top + log total."""
    empty = total == 0
    # Derivatives treat the maximum as a constant: a change of top changes log total by
    # the opposite amount, so the two changes cancel in the logsumexp.
    logsumexp = jax.lax.stop_gradient(top) + jnp.log(jnp.where(empty, 1, total))
    return State(output, jnp.where(empty, -jnp.inf, logsumexp))


def _nothing(problem: Problem) -> State:
    """Gives the state of queries without keys: output 0 and logsumexp −∞."""
    B, N, T, _ = problem.sizes.BNTS
    output = jnp.zeros((B, T, N, problem.sizes.D), problem.wide)
    return State(output, jnp.full((B, T, N), -jnp.inf, problem.wide))
