"""A few queries by the tokens of a store, as one operation.

It takes the time of what is filled; see `implementations.parts`. Derivatives are those of
whole rows, of any order.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.call.problem import Operands, Problem
from jattn.implementations import parts
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.implementations.kernel import types_of_sums
from jattn.implementations.source import Source
from jattn.operations.operation import Operation, restrict


def attend(problem: Problem, operands: Operands, source: Source, end):
    """Gives the output BTND and the maximum and the sum BTN, by one operation.

    Args:
        problem: The call.
        operands: Its arrays, without keys and values; the words of dropout are drawn.
        source: Where keys and values are.
        end: A slot that no query sees anything from, as an int32.
    """
    leaves, tree = jax.tree.flatten((operands, source, end))
    return Decode(problem, tree)(*leaves)


@dataclasses.dataclass(frozen=True)
class Decode(Operation):
    """The leaves of operands, source and end to output, maximum and sum, as blockwise."""

    problem: Problem
    tree: Any

    @property
    def outputs(self) -> int:
        """Counts output, maximum and sum."""
        return 3

    @property
    def elements(self) -> int:
        """Gives all logits, and the weights."""
        B, N, T, S = self.problem.sizes.BNTS
        return 2 * B * N * T * S

    def types(self, *types):
        """Gives BTND, and twice BTN."""
        return types_of_sums(self.problem, types[0])

    def fast(self, *leaves, spread):
        """Computes it by the parts that are filled."""
        del spread
        operands, source, end = self.tree.unflatten(leaves)
        with jax.default_matmul_precision(self.problem.precision):
            return parts.attend(self.problem, operands, source, _furthest(end))

    def reference(self, *leaves):
        """Computes it a few whole rows at a time."""
        operands, source, _ = self.tree.unflatten(leaves)
        with jax.default_matmul_precision(self.problem.precision):
            key, value = source.vectors(self.problem.wide)
            return by_rows(self.problem, operands._replace(key=key, value=value))

    def push(self, active, primals, outputs, tangents, spread):
        """Goes through whole rows, which keep out what is masked."""
        del outputs, spread
        return jax.jvp(*restrict(self.reference, active, primals), tuple(tangents))[1]


@custom_vmap
def _furthest(end):
    return end


@_furthest.def_vmap
def _(size, mapped, end):
    """Takes one end for all slices: JAX would run every branch if they differed."""
    del size, mapped
    return _furthest(jnp.max(end)), False
