"""Attention as one operation: a kernel where there is one, and blockwise for all the rest.

Here, and nowhere else, one way to compute takes over from another:

    forward      the kernel; blockwise where it let a hidden NaN through
    cotangents   the kernel; blockwise where it has no way, or let a hidden NaN through
    tangents     blockwise, and so are derivatives of higher order
    all of it    blockwise on platforms that the kernel refuses, and where XLA is to divide
                 the arrays of one call among devices, which it cannot do to a kernel:
                 inside `jax.shard_map` each device runs the kernel
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.blockwise.backward import backward
from jattn.implementations.blockwise.forward import forward
from jattn.implementations.blockwise.join import join
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import plan
from jattn.implementations.blockwise.tangent import tangent
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.implementations.kernel import (
    Kernel,
    Sums,
    check_cotangents,
    check_sums,
)
from jattn.operations.join import Joined, Leading
from jattn.operations.mapped import cond_any
from jattn.operations.operation import Operation, retype


def _precise(method):
    """The method, its products in the precision that was asked for when it was called.

    An operation is compiled after the caller's `jax.default_matmul_precision` ended.
    """

    @functools.wraps(method)
    def precise(self, *args, **kwargs):
        with jax.default_matmul_precision(self.problem.precision):
            return method(self, *args, **kwargs)

    return precise


@dataclasses.dataclass(frozen=True)
class Attention(Operation):
    """The leaves of `Operands`, its rng made into words, to `Sums`.

    A derivative takes `top` for a constant, so it is right for functions of
    top + log total, the logsumexp, alone.

    Attributes:
        problem: The call.
        tree: The structure of its operands.
        size: The granularity of tiles.
        tile: How many queries and keys a tile has, instead.
        kernels: Which kernels may run, in their order.
        kernel: The one that runs on the platform at hand.
        widens: Whether backward takes products of bfloat16 in float32: XLA:CPU lacks some
            of them where `vmap` adds axes, and float32 costs nothing there. Forward does
            the same where a cotangent that starts from its output may be of float32.
    """

    problem: Problem
    tree: Any
    size: int
    tile: tuple[int, int] | None = None
    kernels: tuple[Kernel, ...] = ()
    kernel: Any = dataclasses.field(default=None, kw_only=True)
    widens: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def outputs(self) -> int:
        """Output, maximum and sum."""
        return len(Sums._fields)

    @property
    def linear_in(self) -> frozenset[int]:
        """The values."""
        return frozenset({Operands._fields.index("value")})

    @property
    def names(self) -> tuple[str, ...]:
        """For policies of `jax.checkpoint`; maximum and sum are two parts of one thing."""
        return "jattn_output", "jattn_logsumexp", "jattn_logsumexp"

    def on(self, platform: str) -> Operation:
        """Itself, with the kernel that takes it on the platform, if one does."""
        taking = (x for x in self.kernels if x.refusal(self.problem, platform) is None)
        kernel, widens = next(taking, None), platform == "cpu"
        return dataclasses.replace(self, kernels=(), kernel=kernel, widens=widens)

    def joined(self, size, mapped, apart):
        """A call with more examples, unless slices share their keys."""
        found = join(self.problem, self.tree, size, mapped, apart)
        if found is None:
            return None
        problem, slots = found
        outputs = (Leading(size, self.problem.sizes.B, apart=True),) * self.outputs
        return Joined(dataclasses.replace(self, problem=problem), slots, outputs)

    @property
    def elements(self) -> int:
        """Two tiles."""
        B, K, G, T, S, *_ = self._plan(spread=False)
        return 2 * B * K * G * T * S

    def types(self, *types):
        """BTND, and twice BTN."""
        B, N, T, _ = self.problem.sizes.BNTS
        query, wide = types[0], self.problem.wide
        spec = query.sharding.spec[:3]
        output = retype(query, (B, T, N, self.problem.sizes.D), wide, (*spec, None))
        return [output, *[retype(query, (B, T, N), wide, spec)] * 2]

    @_precise
    def fast(self, *leaves, spread):
        """By the kernel; else tile by tile."""
        operands = self.tree.unflatten(leaves)
        if self.kernel is None:
            wide = self.widens and _is_felt_wide(self.problem, operands)
            return forward(Layout(self.problem, operands, self._plan(spread), wide))
        otherwise = functools.partial(self._blockwise(spread).fast, spread=spread)
        if spread:
            return otherwise(*leaves)
        sums = check_sums(self.problem, self.kernel.forward(self.problem, operands))
        return self._unspoiled(sums, otherwise, leaves)

    @_precise
    def reference(self, *leaves):
        """A few whole rows at a time."""
        return by_rows(self.problem, self.tree.unflatten(leaves))

    @_precise
    def push(self, active, primals, outputs, tangents, spread):
        """Tile by tile."""
        if self.kernel is not None:
            return self._push_own(active, primals, outputs, tangents, spread)
        layout = Layout(self.problem, self.tree.unflatten(primals), self._plan(spread))
        tangents = iter(tangents)
        tangents = [next(tangents) if flag else None for flag in active]
        return tangent(layout, outputs, self.tree.unflatten(tangents))

    def _push_own(self, active, primals, outputs, tangents, spread):
        """Tile by tile, from a maximum and sum of its own, which fit its own products."""
        blockwise = self._blockwise(spread)
        own = outputs if spread else blockwise.fast(*primals, spread=spread)
        d_output, d_top, d_total = blockwise.push(active, primals, own, tangents, spread)
        return d_output, d_top, d_total * _ratio(outputs, own)

    @_precise
    def pull(self, active, primals, outputs, cotangents, spread):
        """By the kernel, whose own derivatives are blockwise; else tile by tile."""
        if self.kernel is None:
            operands, wanted = map(self.tree.unflatten, (primals, active))
            layout = Layout(self.problem, operands, self._plan(spread), self.widens)
            results = backward(layout, outputs, cotangents, wanted)
            return self._chosen(active, primals, results)
        otherwise = functools.partial(self._pull_own, active, spread)
        if spread:
            return otherwise(primals, outputs, cotangents)
        pull = jax.custom_jvp(functools.partial(self._pull, active, otherwise))
        pull.defjvp(functools.partial(jax.jvp, otherwise))
        return pull(primals, outputs, cotangents)

    def _pull(self, active, otherwise, primals, outputs, cotangents):
        """By the kernel, where it can."""
        operands, wanted = map(self.tree.unflatten, (primals, active))
        sums = Sums(*outputs), Sums(*cotangents)
        results = self.kernel.backward(self.problem, operands, *sums, wanted)
        if results is None:
            return otherwise(primals, outputs, cotangents)
        results = self._chosen(active, primals, check_cotangents(operands, results))
        return self._unspoiled(results, otherwise, (primals, outputs, cotangents))

    def _pull_own(self, active, spread, primals, outputs, cotangents):
        """Tile by tile; from a maximum and sum of its own, if the kernel's are rounded."""
        blockwise = self._blockwise(spread)
        if not spread and not self.kernel.exact:
            own = blockwise(*primals)
            d_output, d_top, d_total = cotangents
            outputs, cotangents = own, (d_output, d_top, d_total * _ratio(outputs, own))
        return blockwise.pull(active, primals, outputs, cotangents, spread)

    def _unspoiled(self, results, otherwise, arrays):
        """The results, or those of `otherwise` where a hidden NaN may have reached them."""
        if self.problem.mask is None or self.kernel.isolates:
            return tuple(results)
        floating = [x for x in results if jnp.issubdtype(x.dtype, jnp.floating)]
        spoiled = [jnp.any(jnp.isnan(x)) for x in floating]
        return cond_any(
            functools.reduce(jnp.logical_or, spoiled),
            lambda xs: tuple(otherwise(*xs)),
            lambda _: tuple(results),
            arrays,
        )

    def _blockwise(self, spread: bool) -> "Attention":
        """The same without the kernel.

        Where it may begin with the maximum and sum of the kernel, which keep all bits of
        float32, its own products do so too.
        """
        problem = self.problem
        if not spread and self.kernel.exact and problem.precision is None:
            problem = dataclasses.replace(problem, precision="highest")
        return dataclasses.replace(self, problem=problem, kernel=None)

    def _plan(self, spread: bool):
        return plan(self.problem, spread, self.size, self.tile)

    def _chosen(self, active, primals, results: Operands) -> list[jax.Array]:
        """The cotangents of the active arguments, in their dtypes."""
        leaves = self.tree.flatten_up_to(results)
        return [
            jnp.zeros(x.shape, x.dtype) if result is None else result.astype(x.dtype)
            for x, result, flag in zip(primals, leaves, active, strict=True)
            if flag
        ]


def _is_felt_wide(problem: Problem, operands: Operands) -> bool:
    """Whether something may have a cotangent that is not rounded as the inputs are.

    Scale, bias, a sink and what a modifier reads are in the wide precision: a weight that
    was rounded to bfloat16 would be seen in their gradients.
    """
    given = problem.given & {"bias", "scale", "logsumexp"}
    return bool(given or operands.bias is not None or jax.tree.leaves(operands.modifier))


def _ratio(outputs, own):
    """What turns tangents of one total into those of another, of the same logsumexp."""
    total = own[2]
    return outputs[2] / jnp.where(total == 0, 1, total)
