"""The contract of an implementation: what it must say, compute, and keep exact."""

import abc
from typing import NamedTuple

import chex
import jax

from jattn.call.problem import Operands, Problem
from jattn.state import State


class Sums(NamedTuple):
    """What a row of logits adds up to, in the wide precision of the problem.

    The two numbers of a row stay apart, for a sum of them would be rounded as a number of
    the size of the logits:

        top    = maxₛ logitₛ              0 where the row sees nothing
        total  = Σₛ exp(logitₛ − top)     0 where the row sees nothing

    Another `top` will do as long as top + log total is the logsumexp.
    """

    output: jax.Array  # BTND, Σₛ weightₛ vₛ; 0 where the row sees nothing
    top: jax.Array  # BTN
    total: jax.Array  # BTN


class Implementation(abc.ABC):
    """A way to compute attention, under a name in `dispatch.IMPLEMENTATIONS`.

    Laws:
        1. What it does not refuse it computes as `jattn.definition` does, within the error
           budget of `jattn.testing`, on every case.
        2. `refusal` looks at nothing but its arguments and the machine, runs nothing, and
           answers with a sentence that ends the sentence "It …".
        3. Its functions can be traced: inside `jit`, with any operand unknown.
    """

    @abc.abstractmethod
    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why it cannot take a problem on a platform; None where it can."""

    @abc.abstractmethod
    def block_sizes(
        self, problem: Problem, operands: Operands | None
    ) -> tuple[int, int] | None:
        """Gives how many queries and keys it skips at once, None where it skips nothing.

        Operands of None are unknown.
        """


class Plain(Implementation):
    """An implementation in plain JAX, with derivatives of every order of its own."""

    @abc.abstractmethod
    def attention_state(self, problem: Problem, operands: Operands) -> State:
        """Computes the output BTND in the wide precision, and the logsumexp BTN."""


class Kernel(Implementation):
    """An implementation by code that JAX cannot differentiate; a value that hashes.

    It has to know one forward pass, and may know a backward pass. All else is done for it
    by `attention.Attention`, blockwise: tangents, derivatives of higher order, gradients
    without a `backward`, arrays that XLA divides among devices, and results that a hidden
    NaN or Inf has spoiled.

    Further laws:
        4. `forward` and `backward` see operands that were prepared: dropout's words are
           drawn, and arrays that read one side of a pair are aligned.
        5. Without a mask a NaN or Inf goes where the definition lets it go. With one, it
           may go anywhere as NaN, unless `isolates` says that it reaches nothing that
           must not see it: where a result has a NaN, blockwise computes it again.
        6. `exact` says that top + log total is the logsumexp, exactly enough to begin
           derivatives with. If not, blockwise begins with a pass of its own.
    """

    isolates: bool = False
    exact: bool = True

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
        """Computes the cotangents of the operands that are `wanted`, None for others.

        None altogether where it has no way to compute one of them. The cotangent of `top`
        is not looked at, for derivatives take the largest logit for a constant.
        """
        del problem, operands, outputs, cotangents, wanted
        return None


def check_sums(problem: Problem, sums: Sums) -> Sums:
    """Asserts what the contract says of the results of a forward pass."""
    B, N, T, _ = problem.sizes.BNTS
    chex.assert_shape(sums.output, (B, T, N, problem.sizes.D))
    chex.assert_shape([sums.top, sums.total], (B, T, N))
    chex.assert_type(list(sums), problem.wide)
    return sums


def check_cotangents(operands: Operands, results: Operands) -> Operands:
    """Asserts that each cotangent has the shape of its operand."""
    is_none = lambda x: x is None
    for x, result in zip(
        jax.tree.leaves(operands),
        jax.tree.structure(operands).flatten_up_to(results),
        strict=True,
    ):
        if not is_none(result):
            chex.assert_equal_shape([x, result])
    return results
