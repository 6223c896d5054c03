"""A call by the operation, with or without kernels."""

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.attention import Attention
from jattn.implementations.blockwise.plan import granularity, tile_sizes
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.kernel import (
    Kernel,
    Plain,
)
from jattn.state import State


class Blockwise(Plain):
    """Tile by tile, in plain JAX: what every kernel falls back on."""

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Takes everything, anywhere."""
        del problem, platform

    def block_sizes(self, problem: Problem, operands: Operands | None) -> tuple[int, int]:
        """How many queries and keys a tile has."""
        return tile_sizes(problem, granularity(problem, operands))

    def attention_state(self, problem: Problem, operands: Operands) -> State:
        """The state, without any kernel."""
        return attention_state(problem, operands)


def attention_state(
    problem: Problem,
    operands: Operands,
    kernels: tuple[Kernel, ...] = (),
    tile: tuple[int, int] | None = None,
) -> State:
    """The output BTND in the wide precision, and the logsumexp BTN.

    Of `kernels` the first runs that does not refuse the platform that the call is compiled
    for, and blockwise where all do. `tile` is how many queries and keys a tile of blockwise
    has, where the measured rule is not wanted.
    """
    sizes = problem.sizes
    if any(isinstance(x, int) and x == 0 for x in (sizes.B, sizes.T, sizes.S)):
        return _nothing(problem)
    problem, operands, size = prepare(problem, operands, tile)
    leaves, tree = jax.tree.flatten(operands)
    return state_of(*Attention(problem, tree, size, tile, kernels)(*leaves))


def state_of(output, top, total) -> State:
    """The state, of the outputs of `Attention`."""
    empty = total == 0
    # The maximum is a constant to derivatives: what it adds to them, the sum takes away.
    logsumexp = jax.lax.stop_gradient(top) + jnp.log(jnp.where(empty, 1, total))
    return State(output, jnp.where(empty, -jnp.inf, logsumexp))


def _nothing(problem: Problem) -> State:
    """The state of queries without keys."""
    B, N, T, _ = problem.sizes.BNTS
    output = jnp.zeros((B, T, N, problem.sizes.D), problem.wide)
    return State(output, jnp.full((B, T, N), -jnp.inf, problem.wide))
