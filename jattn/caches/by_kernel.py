"""A few queries by the slots of a source, where they lie, by a kernel for TPU."""

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.source import Source
from jattn.implementations.sums import Sums
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.implementations.tpu.decode.slots import Slots
from jattn.operations.mapped import cond_any


class Stored(Source, Protocol):
    """A source whose arrays a kernel can read where they lie."""

    @property
    def dtype(self) -> str:
        """Names the dtype of the numbers, which may be stored in another one."""

    def arrays(self) -> Slots:
        """Gives the arrays where they lie."""


def refusal(kernel: Decoder, problem: Problem, operands, source: Stored) -> str | None:
    """Says why a kernel cannot attend to a source; None if it can."""
    del operands
    return kernel.refusal(problem, source.arrays(), source.dtype)


def by_kernel(
    kernel: Decoder, problem: Problem, operands: Operands, source: Stored, mend: Callable
) -> Sums:
    """Attends by a kernel; by `mend`, without arguments, if a result is not finite.

    The NaN may come from a value that no query sees: 0 · NaN is NaN.
    """
    sums = kernel.forward(problem, operands, source.arrays())
    if problem.mask is None:
        return sums
    spoiled = ~jnp.all(jnp.isfinite(sums.output))
    return cond_any(spoiled, lambda _: Sums(*mend()), lambda x: x, sums)
