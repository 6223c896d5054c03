"""Attention as one operation: a kernel where there is one, and blockwise for all the rest.

Only this module decides that one way to compute replaces another:

    forward      the kernel; blockwise if the kernel let a hidden NaN through
    cotangents   the kernel; blockwise if the kernel has no backward pass for them, or let
                 a hidden NaN through
    tangents     blockwise, and so are derivatives of higher order
    everything   blockwise on platforms that the kernel refuses, and where XLA divides the
                 arrays of one call among devices, because XLA cannot divide a kernel;
                 inside `jax.shard_map` each device runs the kernel
"""

import dataclasses
import functools
from typing import Any

import jax

from jattn.call.problem import VECTORS, Operands, Problem, with_narrow_vectors
from jattn.implementations.agree import chosen, is_felt_wide, precise, ratio, unspoiled
from jattn.implementations.blockwise.backward import backward
from jattn.implementations.blockwise.forward import forward
from jattn.implementations.blockwise.join import join
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import flat_logits, plan
from jattn.implementations.blockwise.tangent import tangent
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.implementations.kernel import Kernel, check_cotangents, check_sums, types_of_sums
from jattn.implementations.processor import multiplies_bfloat16
from jattn.implementations.sums import Sums
from jattn.operations.join import Joined, Leading
from jattn.operations.operation import Operation


@dataclasses.dataclass(frozen=True)
class Attention(Operation):
    """The operation that maps the leaves of `Operands` to `Sums`.

    In the operands, the rng is already replaced by dropout's random words.

    Derivatives treat `top` as a constant. So they are right only for functions that use
    `top` and `total` together, as the logsumexp top + log total.

    Attributes:
        problem: The call.
        tree: The structure of its operands.
        tile: How many queries and keys a tile has; replaces the choice of `plan`.
        kernels: The kernels that may run, in order of preference.
        flat: The most logits in a tile where one loop visits the tiles of all blocks, as
            on a GPU; 0 for loops over the tiles of each block. None: as the platform asks.
        kernel: The kernel that runs on the current platform.
        widens: Whether backward computes bfloat16 products in float32: where the caller
            asks for precise products, and on a CPU. XLA:CPU lacks some batched bfloat16
            products, and float32 costs nothing there. So the logits of forward are of
            float32 products too; and its sums, where precise products are asked for, the
            processor is slow in bfloat16, or a cotangent that starts from its output may
            be float32.
        apart: Whether each head is multiplied apart, as it is in all derivatives.
    """

    problem: Problem
    tree: Any
    tile: tuple[int, int] | None = None
    kernels: tuple[Kernel, ...] = ()
    flat: int | None = None
    kernel: Any = dataclasses.field(default=None, kw_only=True)
    widens: bool = dataclasses.field(default=False, kw_only=True)
    apart: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def outputs(self) -> int:
        """Counts the outputs: output, maximum and sum."""
        return len(Sums._fields)

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the index of the argument that the output is linear in: the values."""
        return frozenset({Operands._fields.index("value")})

    @property
    def constant(self) -> frozenset[int]:
        """Gives the outputs that do not depend on the values: maximum and sum."""
        return frozenset(map(Sums._fields.index, ("top", "total")))

    @property
    def may_be_wide(self) -> frozenset[int]:
        """Gives queries, keys and values."""
        return frozenset(map(Operands._fields.index, VECTORS))

    @property
    def names(self) -> tuple[str, ...]:
        """Names the outputs for policies of `jax.checkpoint`.

        Maximum and sum share a name, since together they are the logsumexp.
        """
        return "jattn_output", "jattn_logsumexp", "jattn_logsumexp"

    def on(self, platform: str) -> Operation:
        """Chooses the first kernel that accepts the problem on the platform, if any."""
        taking = (x for x in self.kernels if x.refusal(self.problem, platform) is None)
        chosen: dict[str, Any] = {"kernel": next(taking, None)}
        chosen["widens"] = platform == "cpu" or self.problem.is_precise
        if self.flat is None:
            chosen["flat"] = flat_logits(platform)
        return dataclasses.replace(self, kernels=(), **chosen)

    def joined(self, size, mapped, apart):
        """Joins the slices into a call with more examples; None if they share keys."""
        found = join(self.problem, self.tree, size, mapped, apart)
        if found is None:
            return None
        problem, slots = found
        outputs = (Leading(size, self.problem.sizes.B, apart=True),) * self.outputs
        return Joined(dataclasses.replace(self, problem=problem), slots, outputs)

    @property
    def elements(self) -> int:
        """Gives the number of pairs in two tiles."""
        B, K, G, T, S, *_ = self._plan(spread=False)
        return 2 * B * K * G * T * S

    def types(self, *types):
        """Gives the types of the outputs: BTND for the output, BTN for the two sums."""
        return types_of_sums(self.problem, types[0])

    @precise
    def fast(self, *leaves, spread):
        """Computes the outputs by the kernel if there is one, else tile by tile."""
        operands = self._operands(leaves)
        if self.kernel is None:
            plan = self._plan(spread)
            slow = not (plan.folded or multiplies_bfloat16())
            asked = slow or self.problem.is_precise
            wide = self.widens and (asked or is_felt_wide(self.problem, operands))
            return forward(Layout(self.problem, operands, plan, wide, self.widens))
        if spread:  # XLA cannot divide a kernel among devices
            return self._blockwise(spread).fast(*leaves, spread=spread)
        sums = check_sums(self.problem, self.kernel.forward(self.problem, operands))
        mend = functools.partial(self._frugal()._blockwise(spread).fast, spread=spread)
        return unspoiled(self.problem, self.kernel, sums, mend, leaves)

    @precise
    def reference(self, *leaves):
        """Computes the outputs a few whole rows at a time."""
        return by_rows(self.problem, self._operands(leaves))

    @precise
    def push(self, active, primals, outputs, tangents, spread):
        """Computes the tangents of the outputs tile by tile."""
        if not self._fits(spread):
            return self._push_own(active, primals, outputs, tangents, spread)
        # As wide as in `pull`: the logits are those of forward, to the last bit.
        operands, widths = self._operands(primals), (self.widens, self.widens)
        layout = Layout(self.problem, operands, self._plan(spread), *widths)
        # Tangents are given for the active arguments only; None stands for the others.
        tangents = iter(tangents)
        tangents = [next(tangents) if flag else None for flag in active]
        return tangent(layout, outputs, self.tree.unflatten(tangents))

    def _push_own(self, active, primals, outputs, tangents, spread):
        """Computes the tangents tile by tile, after a blockwise forward pass of its own.

        The kernel and blockwise round their products differently, and so do folded heads
        and single ones. So the maximum and the sum that were computed do not fit the logits
        that blockwise computes again.
        """
        blockwise = self._blockwise(spread)
        own = outputs if spread else blockwise.fast(*primals, spread=spread)
        d_output, d_top, d_total = blockwise.push(active, primals, own, tangents, spread)
        return d_output, d_top, d_total * ratio(outputs, own)

    @precise
    def pull(self, active, primals, outputs, cotangents, spread):
        """Computes the cotangents by the kernel if there is one, else tile by tile.

        JAX cannot differentiate the kernel, so it differentiates the blockwise cotangents
        for derivatives of higher order.
        """
        otherwise = functools.partial(self._pull_own, active, spread)
        if self._fits(spread):
            operands, wanted = self._operands(primals), self.tree.unflatten(active)
            widths = self.widens, self.widens  # the logits of forward, to the last bit
            layout = Layout(self.problem, operands, self._plan(spread), *widths)
            results = backward(layout, outputs, cotangents, wanted)
            return chosen(self.tree, active, primals, results)
        if spread or self.kernel is None:
            return otherwise(primals, outputs, cotangents)
        # JAX differentiates `otherwise` in place of the kernel.
        pull = jax.custom_jvp(functools.partial(self._pull, active, otherwise))
        pull.defjvp(functools.partial(jax.jvp, otherwise))
        return pull(primals, outputs, cotangents)

    def _pull(self, active, otherwise, primals, outputs, cotangents):
        """Computes the cotangents by the kernel; by `otherwise` if the kernel cannot."""
        operands, wanted = self._operands(primals), self.tree.unflatten(active)
        sums = Sums(*outputs), Sums(*cotangents)
        results = self.kernel.backward(self.problem, operands, *sums, wanted)
        if results is None:
            return otherwise(primals, outputs, cotangents)
        results = chosen(self.tree, active, primals, check_cotangents(operands, results))
        mend = functools.partial(self._frugal()._pull_own, active, False)
        arrays = primals, outputs, cotangents
        return unspoiled(self.problem, self.kernel, results, mend, arrays)

    def _pull_own(self, active, spread, primals, outputs, cotangents):
        """Computes the cotangents tile by tile, after a forward pass as in `_push_own`.

        A part of a call has no sums of its own: it starts from those of the whole.
        """
        blockwise = self._blockwise(spread)
        if not spread and not self.problem.part:
            own = blockwise(*primals)
            d_output, d_top, d_total = cotangents
            outputs, cotangents = own, (d_output, d_top, d_total * ratio(outputs, own))
        return blockwise.pull(active, primals, outputs, cotangents, spread)

    def _frugal(self) -> "Attention":
        """Gives the same operation with small tiles, for what runs rarely.

        XLA plans the memory of both branches of a condition. One loop over all tiles needs
        up to 30 times as much as loops for each block.
        """
        return dataclasses.replace(self, flat=0)

    def _blockwise(self, spread: bool) -> "Attention":
        """Gives the same operation without the kernel, in products as precise as its own.

        No heads are folded, so derivatives start from its sums. A part of a call starts
        from the sums of kernels, which its logits have to fit.
        """
        problem = self.problem
        exact = self.kernel is not None and self.kernel.exact
        if not spread and exact and problem.precision is None:
            problem = dataclasses.replace(problem, precision="highest")
        return dataclasses.replace(self, problem=problem, kernel=None, apart=True)

    def _fits(self, spread: bool) -> bool:
        """Says whether derivatives compute the logits of forward, to the last bit."""
        return self.kernel is None and not self._plan(spread).folded

    def _operands(self, leaves) -> Operands:
        return with_narrow_vectors(self.problem, self.tree.unflatten(leaves))

    def _plan(self, spread: bool):
        found = plan(self.problem, spread, self.tile, self.flat or 0)
        # The derivatives of a part start from the sums of all parts.
        return found._replace(folded=False) if self.apart or self.problem.part else found
