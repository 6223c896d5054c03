"""What makes the results of a kernel, or of folded heads, and of blockwise fit together."""

import functools

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.kernel import Kernel
from jattn.operations.mapped import cond_any


def precise(method):
    """Makes a method compute its products in the precision of the call.

    JAX may compile an operation after the caller's `jax.default_matmul_precision` block
    has ended, so the problem stores the precision and the method sets it again.
    """

    @functools.wraps(method)
    def precise(self, *args, **kwargs):
        with jax.default_matmul_precision(self.problem.precision):
            return method(self, *args, **kwargs)

    return precise


def unspoiled(problem: Problem, kernel: Kernel, results, mend, arrays):
    """Gives a kernel's results, or computes them by `mend` if one is not finite.

    The NaN may come from a pair that the mask hides. A kernel that `isolates` never
    lets such a NaN through, and without a mask no pair is hidden.
    """
    if problem.mask is None or kernel.isolates:
        return tuple(results)
    # Only floating results can be NaN or Inf.
    floating = [x for x in results if jnp.issubdtype(x.dtype, jnp.floating)]
    spoiled = [~jnp.all(jnp.isfinite(x)) for x in floating]
    return cond_any(
        functools.reduce(jnp.logical_or, spoiled),
        lambda xs: tuple(mend(*xs)),
        lambda _: tuple(results),
        arrays,
    )


def is_felt_wide(problem: Problem, operands: Operands) -> bool:
    """Says whether some cotangent may have more precision than the inputs have.

    Scale, bias, a sink and the arrays of a modifier are in the wide precision. Weights
    that were rounded to bfloat16 would make their gradients visibly less precise. Under a
    modifier they would do so to those of queries, which backward mends elsewhere.
    """
    given = problem.given & {"bias", "scale", "logsumexp"}
    return bool(given or operands.bias is not None or problem.modifier is not None)


def ratio(outputs, own):
    """Computes the factor that turns a tangent of one total into that of another.

    Both totals belong to the same logsumexp = top + log total, with different tops. So
    d log total = d_total / total is the same for both, and the factor is their ratio. An
    empty row has total 0, and 1 in the divisor keeps its factor finite.
    """
    total = own[2]
    return outputs[2] / jnp.where(total == 0, 1, total)


def chosen(tree, active, primals, results: Operands) -> list[jax.Array]:
    """Picks the cotangents of the active leaves of a tree, each in its leaf's dtype."""
    leaves = tree.flatten_up_to(results)
    # A leaf for which the results have None has the cotangent 0.
    return [
        jnp.zeros(x.shape, x.dtype) if result is None else result.astype(x.dtype)
        for x, result, flag in zip(primals, leaves, active, strict=True)
        if flag
    ]
