"""Attention by kernels for TPU, as an operation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn import skipping
from jattn.blockwise import attention as anywhere
from jattn.operation import Operation
from jattn.problem import Operands, Problem
from jattn.split import joint_equations
from jattn.state import State
from jattn.tpu import layout
from jattn.tpu.layout import LOG2_E
from jattn.tpu.pairs import objection
from jattn.tpu.schedule import MOST_INNER

_BLOCKS = (512, 512)
_TUNING = (256, 512)


def refusal(problem: Problem, platform: str) -> str | None:
    """What a kernel cannot be written for."""
    if platform != "tpu":
        return f"runs on TPU only, and the platform is {platform}."
    return _objection(problem)


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    sizes = problem.sizes
    if problem.dtype.name not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, which TPUs multiply, got {problem.dtype}."
    if not all(isinstance(size, int) for size in sizes.BNTS):
        return "needs sizes that are numbers; these are symbols."
    if 0 in (*sizes.BNTS, sizes.H, sizes.D):
        return "needs at least one query, key and number in each."
    if max(sizes.H, sizes.D) > 256:
        return f"takes head sizes up to 256, got H={sizes.H} and D={sizes.D}."
    block_q, block_kv = block_sizes(problem, None)
    if MOST_INNER * block_q < sizes.T or MOST_INNER * block_kv < sizes.S:
        return f"takes up to {MOST_INNER} blocks of 512, got T={sizes.T} and S={sizes.S}."
    for name in ("mask", "modifier"):
        program = getattr(problem, name)
        if program is not None:
            found = objection(joint_equations(program, logit=name == "modifier"))
            if found:
                return (
                    f"the {name} joins queries and keys by {found}, which a kernel cannot "
                    f"evaluate; it can where only queries or only keys are indexed."
                )
    return None


def block_sizes(problem: Problem, operands: Operands | None) -> tuple[int, int]:
    """How many queries and keys are skipped at once, where heads are folded."""
    del operands
    plan = layout.plan(problem.sizes, True, _BLOCKS)
    return plan.block_q, plan.block_kv


def attention_state(
    problem: Problem,
    operands: Operands,
    blocks: tuple[int, int] = _BLOCKS,
    tuning: tuple[int, int] = _TUNING,
    interpret: Any = False,
) -> State:
    """The output BTND in the dtype of the inputs, and the logsumexp BTN.

    `blocks` is how many columns and keys a block has, `tuning` how many keys and columns
    a part of it. `interpret` emulates the kernels on any platform, for tests.
    """
    problem, operands, size = anywhere.prepared(problem, operands)
    leaves, tree = jax.tree.flatten(operands)
    operation = Attention(problem, tree, size, None, blocks, tuning, interpret)
    return State(*operation(*leaves))


@dataclasses.dataclass(frozen=True)
class Attention(anywhere.Attention):
    """As blockwise, with the forward and backward pass by kernels.

    On other platforms than TPU it is blockwise; tangents and derivatives of higher order
    are so everywhere.
    """

    blocks: tuple[int, int] = _BLOCKS
    tuning: tuple[int, int] = _TUNING
    interpret: Any = False

    def on(self, platform: str) -> Operation:
        """Itself on TPU, and wherever it is emulated; else blockwise."""
        if platform == "tpu" or self.interpret:
            return self
        return anywhere.Attention(self.problem, self.tree, self.size)

    def fast(self, *leaves, spread):
        """By a kernel."""
        operands = self.tree.unflatten(leaves)
        results = self._forward(operands)
        if self.problem.mask is None:
            return results
        # What is not finite in a key or value meets weights of 0 in products.
        otherwise = functools.partial(super().fast, spread=spread)
        return jax.lax.cond(
            _spoiled(results), lambda xs: tuple(otherwise(*xs)), lambda _: results, leaves
        )

    def pull(self, active, primals, outputs, cotangents, spread):
        """By a kernel."""
        otherwise = functools.partial(super().pull, active, spread=spread)
        operands, wanted = map(self.tree.unflatten, (primals, active))
        results = self._backward(operands, wanted, outputs, cotangents)
        if results is None:
            return otherwise(primals, outputs, cotangents)
        results = self.tree.flatten_up_to(results)
        results = [
            jnp.zeros(x.shape, x.dtype) if result is None else result.astype(x.dtype)
            for x, result, flag in zip(primals, results, active, strict=True)
            if flag
        ]
        if self.problem.mask is None:
            return results
        return jax.lax.cond(
            _spoiled(results),
            lambda xs: otherwise(*xs),
            lambda _: results,
            (primals, outputs, cotangents),
        )

    def _forward(self, operands: Operands):
        from jattn.tpu.forward import forward

        plan, call, steps, arranged = self._call(operands, by_query=True)
        sizes = self.problem.sizes
        query, key, value = self._inputs(operands, plan)
        output, logsumexp = forward(
            call,
            steps,
            (query, key, jnp.swapaxes(value, 2, 3)),
            self._numbers(operands)[1],
            arranged,
            self.tuning,
            self.interpret,
        )
        return (
            layout.unqueries(output, plan, sizes, (sizes.D,)),
            layout.unqueries(logsumexp, plan, sizes, ()),
        )

    def _backward(self, operands: Operands, wanted: Operands, outputs, cotangents):
        """The cotangents of the operands, or None where the kernel has no place for one."""
        from jattn.tpu.backward import backward

        plan, call, steps, arranged = self._call(operands, by_query=False)
        flags = _wanted(call.shapes, wanted)
        if any(
            flag and layout.kind(x) == "tile"
            for x, flag in zip(*map(jax.tree.leaves, (call.shapes, flags)), strict=True)
        ):
            return None
        sizes, wide = self.problem.sizes, self.problem.wide
        output, logsumexp = outputs
        d_output, d_logsumexp = cotangents
        delta = jnp.sum(d_output.astype(wide) * output.astype(wide), axis=-1) - d_logsumexp
        empty = logsumexp == -jnp.inf
        rows = jnp.where(empty, jnp.inf, logsumexp * LOG2_E), jnp.where(empty, 0, delta)
        query, key, value = self._inputs(operands, plan)
        rows = tuple(layout.queries(x, plan) for x in rows)
        (d_query, d_key, d_value), d_read = backward(
            call,
            steps,
            (query, key, value, layout.queries(d_output, plan), *rows),
            self._numbers(operands)[1],
            arranged,
            flags,
            self.tuning,
            self.interpret,
        )
        d_query = layout.unqueries(d_query, plan, sizes, (sizes.H,))
        finite = jnp.where(jnp.isfinite(operands.query), operands.query, 0)
        d_modifier, d_bias = self._read_cotangents(operands, plan, flags, d_read)
        scale = jnp.abs(jnp.where(operands.scale == 0, 1, operands.scale))
        nothing = jax.tree.map(lambda _: None, wanted)
        return nothing._replace(
            query=d_query * operands.scale,
            key=layout.unkeys(d_key, sizes) * scale,
            value=layout.unkeys(d_value, sizes),
            scale=jnp.sum(d_query * finite.astype(wide)),
            bias=d_bias,
            modifier=d_modifier,
        )

    def _read_cotangents(self, operands: Operands, plan, flags, cotangents):
        """Those of what modifiers and bias are made of, through the split."""

        def read(modifier, bias):
            _, read = layout.extras(
                self.problem, operands._replace(modifier=modifier, bias=bias)
            )
            leaves = zip(*map(jax.tree.leaves, (read, flags)), strict=True)
            return [layout.arrange(x, plan) for x, flag in leaves if flag]

        primals, pull = jax.vjp(read, operands.modifier, operands.bias)
        cotangents = [
            jnp.sum(
                d, [axis for axis in (0, 1) if x.shape[axis] < d.shape[axis]], keepdims=True
            ).astype(x.dtype)
            for x, d in zip(primals, cotangents, strict=True)
        ]
        return jax.tree.map(
            lambda d: None if d.dtype == jax.dtypes.float0 else d, pull(cotangents)
        )

    def _call(self, operands: Operands, by_query: bool):
        """The blocks, the call of a kernel, its schedule, and the arrays it reads."""
        from jattn.tpu.call import Call
        from jattn.tpu.schedule import schedule

        problem = self.problem
        pairs, read = layout.extras(problem, operands)
        plan = layout.plan(problem.sizes, layout.folds(read), self.blocks)
        kinds = self._kinds(operands, plan)
        kinds = kinds if by_query else kinds.swapaxes(2, 3)
        steps = schedule(kinds, plan.heads)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
        call = Call(problem, plan, pairs, shapes, steps.shape, by_query)
        return plan, call, steps, jax.tree.map(lambda x: layout.arrange(x, plan), read)

    def _inputs(self, operands: Operands, plan):
        """Queries with the sign of the scale, keys, and values."""
        sign = self._numbers(operands)[0].astype(self.problem.dtype)
        return (
            layout.queries(operands.query * sign, plan),
            layout.keys(operands.key, plan),
            layout.keys(operands.value, plan),
        )

    def _kinds(self, operands: Operands, plan):
        """The kind of each block; the last keys are partial where some are padding."""
        kinds = skipping.block_table(self.problem, operands, plan.block_q, plan.block_kv)
        xp = np if isinstance(kinds, np.ndarray) else jnp
        kinds = xp.broadcast_to(kinds, (*kinds.shape[:2], plan.queries, plan.keys))
        if plan.keys * plan.block_kv != self.problem.sizes.S:
            last = xp.arange(plan.keys) == plan.keys - 1
            kinds = xp.where(last, xp.minimum(kinds, skipping.PARTIAL), kinds)
        return kinds

    def _numbers(self, operands: Operands):
        """The sign of the scale; and what products, and exponents of 2, are scaled by.

        The sign goes to the queries, so that the largest product is the largest logit.
        """
        scale = operands.scale
        sign, size = jnp.sign(scale), jnp.where(scale == 0, 1, jnp.abs(scale))
        plain = self.problem.modifier is None and operands.bias is None
        exponent = size if plain else jnp.ones_like(size)
        return sign, jnp.stack([size, exponent * LOG2_E])


def _spoiled(arrays):
    """Whether there is a NaN."""
    found = [jnp.any(jnp.isnan(x)) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_or, found)


def _wanted(shapes: layout.Extras, wanted: Operands) -> layout.Extras:
    """Which of the arrays that are read need a cotangent."""
    mark = lambda tree, want: jax.tree.map(
        lambda x: want and jnp.issubdtype(x.dtype, jnp.floating), tree
    )
    nothing = mark(shapes, False)
    modifier = any(jax.tree.leaves(wanted.modifier))
    return nothing._replace(
        modifier=mark(shapes.modifier, modifier), bias=mark(shapes.bias, bool(wanted.bias))
    )
