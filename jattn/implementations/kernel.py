"""The contract of an implementation: what it must say, compute, and keep exact."""

import abc

import chex
import jax

from jattn.call.problem import Operands, Problem
from jattn.implementations.sums import Sums
from jattn.operations.operation import retype


class Implementation(abc.ABC):
    """A way to compute attention, under a name in `dispatch.IMPLEMENTATIONS`.

    Laws:
        1. Every problem that it accepts has the result of `jattn.definition`, within the
           error budget of `jattn.testing`, on every case.
        2. `refusal` reads only its arguments and the machine, and runs no computation. Its
           answer completes a sentence that begins with "It …".
        3. Its functions can be traced: inside `jit`, with any operand unknown.
    """

    @abc.abstractmethod
    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why it refuses a problem on a platform; None if it accepts."""

    def leaves(self, problem: Problem) -> str | None:
        """Says why it leaves a problem that it accepts to others, unless it is named."""
        del problem

    @abc.abstractmethod
    def block_sizes(
        self, problem: Problem, operands: Operands | None, platform: str
    ) -> tuple[int, int] | None:
        """Gives the queries and keys of a block that it can skip; None if it skips none.

        `operands` is None where they are unknown.
        """


class Plain(Implementation):
    """An implementation in plain JAX, which has derivatives of every order itself."""

    @abc.abstractmethod
    def attend(self, problem: Problem, operands: Operands) -> Sums:
        """Computes the output BTND and the sums of each row BTN."""


class Kernel(Implementation):
    """An implementation by code that JAX cannot differentiate; its instances are hashable.

    A kernel must define a forward pass, and may define a backward pass.
    `attention.Attention` does the rest blockwise: tangents, derivatives of higher order,
    gradients without a `backward`, arrays that XLA divides among devices, and results that
    a hidden NaN or Inf has spoiled.

    Further laws:
        4. `forward` and `backward` get prepared operands: dropout's random words are
           drawn, and arrays that depend on one side of a pair are aligned.
        5. Without a mask, a NaN or Inf spreads as in the definition. With a mask, it may
           make any result NaN or Inf; blockwise then computes them again. `isolates`
           says that a hidden NaN or Inf never changes a result; then nothing is computed
           again.
        6. `exact` says that products and sums keep all bits of float32. Then blockwise may
           start from the sums that the kernel found for other parts of the call.
        7. `sets_blocks` says that the table of blocks in its operands has its own blocks;
           other kernels get those of blockwise, resized.
    """

    isolates: bool = False
    exact: bool = True
    sets_blocks: bool = False

    @abc.abstractmethod
    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes the output and the sums of each row."""

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        outputs: Sums,
        cotangents: Sums,
        wanted: Operands,
    ) -> Operands | None:
        """Computes the cotangents of the operands that are `wanted`, None for the others.

        A kernel that cannot compute one of the wanted cotangents returns None instead of
        all of them. It ignores the cotangent of `top`, because derivatives treat the
        largest logit as a constant.
        """
        del problem, operands, outputs, cotangents, wanted
        return None


def types_of_sums(problem: Problem, query) -> list:
    """Gives the types of `Sums`, placed on devices as a query of this type is."""
    B, N, T, _ = problem.sizes.BNTS
    spec = query.sharding.spec[:3]
    rows = retype(query, (B, T, N), problem.wide, spec)
    output = retype(query, (B, T, N, problem.sizes.D), problem.wide, (*spec, None))
    return [output, rows, rows]


def check_sums(problem: Problem, sums: Sums) -> Sums:
    """Asserts that the results of a forward pass have the shapes and dtype of `Sums`."""
    B, N, T, _ = problem.sizes.BNTS
    chex.assert_shape(sums.output, (B, T, N, problem.sizes.D))
    chex.assert_shape([sums.top, sums.total], (B, T, N))
    chex.assert_type(list(sums), problem.wide)
    return sums


def check_cotangents(operands: Operands, results: Operands) -> Operands:
    """Asserts that each cotangent has the shape of its operand."""
    leaves = jax.tree.structure(operands).flatten_up_to(results)
    for x, result in zip(jax.tree.leaves(operands), leaves, strict=True):
        if result is not None:
            chex.assert_equal_shape([x, result])
    return results
