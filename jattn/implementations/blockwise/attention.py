"""Attention block by block, in plain JAX: memory linear in T and S, on any device.

Queries and keys are cut into blocks; the logits of one block of each, a tile, are all
that ever exists of T × S. A table says which tiles a mask leaves empty, which are then
skipped, and which it leaves full, which then need no mask.

    forward    over the tiles of a query block: running maximum, sum and output
    tangent    over the same tiles, with the maximum and sum of each row at hand
    backward   over the tiles of a key block, with logits as columns × rows, so that
               no product contracts the first axis of its left operand
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.blocks import of_call
from jattn.call.hoist import split
from jattn.call.problem import Operands, Problem, apart, drawn, index
from jattn.call.program import Arrays, Index, Program
from jattn.implementations.blockwise.backward import backward
from jattn.implementations.blockwise.forward import forward
from jattn.implementations.blockwise.join import join
from jattn.implementations.blockwise.layout import Layout, granularity, plan, tile_sizes
from jattn.implementations.blockwise.tangent import tangent
from jattn.implementations.blockwise.whole_rows import by_rows
from jattn.operations.join import Joined, Leading
from jattn.operations.operation import Operation, retype
from jattn.operations.varying import locally
from jattn.pytree import pytree
from jattn.state import State


def refusal(problem: Problem, platform: str) -> str | None:
    """Takes everything, anywhere."""
    del problem, platform
    return None


def attention_state(
    problem: Problem, operands: Operands, tile: tuple[int, int] | None = None
) -> State:
    """The output BTND in the wide precision, and the logsumexp BTN.

    `tile` is how many queries and keys a tile has, where the measured rule is not wanted.
    """
    sizes = problem.sizes
    if any(isinstance(x, int) and x == 0 for x in (sizes.B, sizes.T, sizes.S)):
        return _nothing(problem)
    problem, operands, size = prepared(problem, operands, tile)
    leaves, tree = jax.tree.flatten(operands)
    return state_of(*Attention(problem, tree, size, tile)(*leaves))


def state_of(output, top, total) -> State:
    """The state, of the outputs of `Attention`."""
    empty = total == 0
    # The maximum is a constant to derivatives: what it adds to them, the sum takes away.
    logsumexp = jax.lax.stop_gradient(top) + jnp.log(jnp.where(empty, 1, total))
    return State(output, jnp.where(empty, -jnp.inf, logsumexp))


def prepared(problem: Problem, operands: Operands, tile: tuple[int, int] | None = None):
    """The call as an operation takes it, and the granularity of its tiles.

    Dropout's words are drawn: one per query and key serves every tile. What reads one
    side of a pair is evaluated once, not in every pair.
    """
    operands, _ = apart(operands)  # what spoils the results comes after the operation
    if operands.rng is not None:
        words = drawn(problem, operands, index(problem, operands))
        operands = operands._replace(rng=words)
    size = granularity(problem, operands)
    blocks = tile or tile_sizes(problem, size)
    return *_split(problem, operands, blocks), size


def block_sizes(problem: Problem, operands: Operands | None) -> tuple[int, int]:
    """How many queries and keys are skipped at once; None stands for unknown operands."""
    return tile_sizes(problem, granularity(problem, operands))


def _split(problem: Problem, operands: Operands, blocks: tuple[int, int]):
    """The call with what reads one side of a pair evaluated once, not in every pair.

    Which tiles are empty is found before, for positions say more than arrays of them.
    """
    at, parts = index(problem, operands), {}
    for name in ("mask", "modifier"):
        program, arrays = getattr(problem, name), getattr(operands, name)
        if program is not None:
            found = locally(_joint, (program,), arrays, at)
            if len(found.arrays.aligned) > len(arrays.aligned):
                parts[name] = found
    if not parts or not problem.sizes.are_known:
        return problem, operands
    kinds = of_call.block_table(problem, operands, *blocks)
    programs = {name: found.program for name, found in parts.items()}
    arrays = {name: found.arrays for name, found in parts.items()}
    problem = dataclasses.replace(problem, blocks=blocks, settled=True, **programs)
    return problem, operands._replace(kinds=jnp.asarray(kinds), **arrays)


@pytree("arrays", static=("program",))
class _Joint:
    """What `split` gives, as a tree of arrays."""

    program: Program
    arrays: Arrays


def _joint(program: Program, arrays: Arrays, at: Index) -> _Joint:
    program, arrays = split(program, arrays, at)
    return _Joint(arrays=arrays, program=program)


def _is_felt_wide(problem: Problem, operands: Operands) -> bool:
    """Whether something may have a cotangent that is not rounded as the inputs are.

    Scale, bias, a sink and what a modifier reads are in the wide precision: a weight that
    was rounded to bfloat16 would be seen in their gradients.
    """
    given = problem.given & {"bias", "scale", "logsumexp"}
    return bool(given or operands.bias is not None or jax.tree.leaves(operands.modifier))


def _nothing(problem: Problem) -> State:
    """The state of queries without keys."""
    B, N, T, _ = problem.sizes.BNTS
    output = jnp.zeros((B, T, N, problem.sizes.D), problem.wide)
    return State(output, jnp.full((B, T, N), -jnp.inf, problem.wide))


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
    """The leaves of `Operands`, its rng made into words, to output, maximum and sum.

    `top` is the largest logit of a row, `total` Σₛ exp(logitₛ − top); both are 0 where a
    row sees nothing. The three are in the wide precision: derivatives begin with them.
    A derivative takes `top` for a constant, so it is right for functions of
    top + log total, the logsumexp, alone.

    `widens` says that backward takes products of bfloat16 in float32: XLA's CPU does not
    have all of them where `vmap` adds axes, and is no slower so. Forward does the same
    where a cotangent that starts from its output may be of float32.
    """

    problem: Problem
    tree: Any
    size: int
    tile: tuple[int, int] | None = None
    widens: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def outputs(self) -> int:
        """Output, maximum and sum."""
        return 3

    @property
    def linear_in(self) -> frozenset[int]:
        """The values."""
        return frozenset({Operands._fields.index("value")})

    @property
    def names(self) -> tuple[str, ...]:
        """For policies of `jax.checkpoint`; maximum and sum are two parts of one thing."""
        return "jattn_output", "jattn_logsumexp", "jattn_logsumexp"

    def on(self, platform: str) -> Operation:
        """Itself, as the platform can compute it."""
        return dataclasses.replace(self, widens=platform == "cpu")

    def joined(self, size, mapped, apart):
        """A call with more examples, unless slices share their keys."""
        found = join(self.problem, self.tree, size, mapped, apart)
        if found is None:
            return None
        problem, slots = found
        outputs = (Leading(size, self.problem.sizes.B, apart=True),) * self.outputs
        return Joined(dataclasses.replace(self, problem=problem), slots, outputs)

    def plan(self, spread: bool):
        """How much a tile holds."""
        return plan(self.problem, spread, self.size, self.tile)

    @property
    def elements(self) -> int:
        """Two tiles."""
        B, K, G, T, S, *_ = self.plan(spread=False)
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
        """Tile by tile."""
        operands = self.tree.unflatten(leaves)
        wide = self.widens and _is_felt_wide(self.problem, operands)
        return forward(Layout(self.problem, operands, self.plan(spread), wide))

    @_precise
    def reference(self, *leaves):
        """A few whole rows at a time."""
        return by_rows(self.problem, self.tree.unflatten(leaves))

    @_precise
    def push(self, active, primals, outputs, tangents, spread):
        """Tile by tile."""
        layout = Layout(self.problem, self.tree.unflatten(primals), self.plan(spread))
        tangents = iter(tangents)
        tangents = [next(tangents) if flag else None for flag in active]
        return tangent(layout, outputs, self.tree.unflatten(tangents))

    @_precise
    def pull(self, active, primals, outputs, cotangents, spread):
        """Tile by tile."""
        layout = Layout(
            self.problem, self.tree.unflatten(primals), self.plan(spread), self.widens
        )
        results = backward(layout, outputs, cotangents, self.tree.unflatten(active))
        results = self.tree.flatten_up_to(results)
        return [
            jnp.zeros(x.shape, x.dtype) if result is None else result.astype(x.dtype)
            for x, result, flag in zip(primals, results, active, strict=True)
            if flag
        ]
