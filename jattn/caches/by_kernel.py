"""A few queries by the slots of a source, where they lie, by a kernel for TPU."""

from collections.abc import Callable

import jax.numpy as jnp

from jattn.caches.source import Source
from jattn.call.problem import Operands, Problem
from jattn.implementations.kernel import Sums
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.operations.mapped import cond_any


def refusal(kernel: Decoder, problem: Problem, operands, source: Source) -> str | None:
    """Says why a kernel cannot attend to a source; None if it can."""
    del operands
    return kernel.refusal(problem, source.arrays(), source.dtype)


def by_kernel(
    kernel: Decoder, problem: Problem, operands: Operands, source: Source, mend: Callable
) -> Sums:
    """Attends by a kernel; by `mend`, without arguments, if a result is not finite.

    The NaN may come from a value that no query sees: 0 · NaN is NaN.
    """
    sums = kernel.forward(problem, operands, source.arrays())
    if problem.mask is None:
        return sums
    spoiled = ~jnp.all(jnp.isfinite(sums.output))
    return cond_any(spoiled, lambda _: Sums(*mend()), lambda x: x, sums)
