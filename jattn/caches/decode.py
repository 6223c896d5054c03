"""A few queries by the tokens of a store, as one operation.

It takes the time of what is filled; see `implementations.parts`. On TPU a kernel reads the
blocks of slots that the mask of each example leaves, where it knows how; what it refuses
goes by the parts as well. Derivatives are those of whole rows, of any order.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.caches.by_kernel import by_kernel, refusal
from jattn.call.problem import Operands, Problem
from jattn.implementations import parts
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.implementations.kernel import types_of_sums
from jattn.implementations.source import Source
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.operations.operation import Operation, restrict

KERNEL = Decoder()


def attend(problem: Problem, operands: Operands, source: Source, end, kernel=KERNEL):
    """Gives the output BTND and the maximum and the sum BTN, by one operation.

    Args:
        problem: The call.
        operands: Its arrays, without keys and values; the words of dropout are drawn.
        source: Where keys and values are.
        end: A slot that no query sees anything from, as an int32.
        kernel: What computes on its platform.
    """
    leaves, tree = jax.tree.flatten((operands, source, end))
    return Decode(problem, tree, kernel)(*leaves)


@dataclasses.dataclass(frozen=True)
class Decode(Operation):
    """The leaves of operands, source and end to output, maximum and sum, as blockwise.

    Attributes:
        problem: The call.
        tree: The structure of the leaves.
        candidate: The kernel that may run on its platform.
        kernel: That of the current platform.
    """

    problem: Problem
    tree: Any
    candidate: Decoder = KERNEL
    kernel: Decoder | None = dataclasses.field(default=None, kw_only=True)

    @property
    def outputs(self) -> int:
        """Counts output, maximum and sum."""
        return 3

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the index of the values, if they are stored apart and are not rounded."""
        leaves = range(self.tree.num_leaves)
        _, source, _ = self.tree.unflatten(leaves)
        store = getattr(source, "store", source)  # that of the pages, or itself
        apart = store.values is not None and not store.is_rounded
        return frozenset({store.values} if apart else ())

    @property
    def may_be_wide(self) -> frozenset[int]:
        """Gives the index of the query."""
        return frozenset({0})

    @property
    def constant(self) -> frozenset[int]:
        """Gives the outputs that do not depend on the values: maximum and sum."""
        return frozenset({1, 2})

    @property
    def elements(self) -> int:
        """Gives all logits, and the weights."""
        B, N, T, S = self.problem.sizes.BNTS
        return 2 * B * N * T * S

    def types(self, *types):
        """Gives BTND, and twice BTN."""
        return types_of_sums(self.problem, types[0])

    def on(self, platform: str) -> "Decode":
        """Chooses the kernel on its platform."""
        kernel = self.candidate if self.candidate.runs_on(platform) else None
        return dataclasses.replace(self, kernel=kernel)

    def fast(self, *leaves, spread):
        """Computes it by the kernel if it can, else by the parts that are filled."""
        operands, source, end = self.tree.unflatten(leaves)
        operands = operands._replace(query=operands.query.astype(self.problem.dtype))
        call, end = (self.problem, operands, source), _furthest(end)
        with jax.default_matmul_precision(self.problem.precision):
            # XLA cannot divide a kernel among devices.
            if self.kernel is None or spread or refusal(self.kernel, *call):
                return parts.attend(*call, end)
            return by_kernel(self.kernel, *call, lambda: parts.mended(*call, end))

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
