"""Prepares a call for the operation: draws dropout's words, does one-sided work once."""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.blocks import of_call
from jattn.call.hoist import split
from jattn.call.problem import Operands, Problem, apart, drawn, index
from jattn.call.program import Arrays, Index, Program
from jattn.implementations.blockwise.plan import without_bands
from jattn.operations.varying import locally
from jattn.pytree import pytree


def prepare(
    problem: Problem,
    operands: Operands,
    tile: tuple[int, int] | None = None,
    blocks: tuple[int, int] | None = None,
):
    """Prepares a call for the operation.

    Dropout's random words are drawn here, one for each query and one for each key, which
    serve every tile. The part of a mask or modifier that depends on one side of a pair is
    evaluated once here, rather than for every pair. Which blocks are empty is decided
    before that, for `blocks` or else for those of blockwise.
    """
    operands, _ = apart(operands)  # a NaN for positions out of range is added afterwards
    if operands.rng is not None:
        words = drawn(problem, operands, index(problem, operands))
        operands = operands._replace(rng=words)
    # A band needs no table, but a kernel may run in place of blockwise.
    usual = without_bands(problem, spread=False, tile=tile)
    return _split(problem, operands, blocks or usual.cell)


def _split(problem: Problem, operands: Operands, blocks: tuple[int, int]):
    """Evaluates once what depends on one side of a pair, rather than for every pair.

    Which tiles are empty is decided before this, from the original mask: intervals of
    positions tell more than arrays that were computed from positions.
    """
    at, parts = index(problem, operands), {}
    for name in ("mask", "modifier"):
        program, arrays = getattr(problem, name), getattr(operands, name)
        if program is not None:
            found = hoisted(program, arrays, at)
            if _types(found.arrays) != _types(arrays):
                parts[name] = found
    if not parts or not problem.sizes.are_known:
        return problem, operands
    kinds = of_call.block_table(problem, operands, *blocks)
    programs = {name: found.program for name, found in parts.items()}
    arrays = {name: found.arrays for name, found in parts.items()}
    problem = dataclasses.replace(problem, blocks=blocks, settled=True, **programs)
    return problem, operands._replace(kinds=jnp.asarray(kinds), **arrays)


def _types(arrays: Arrays):
    return jax.tree.map(lambda x: (x.shape, x.dtype), (arrays.captured, arrays.aligned))


def hoisted(program: Program, arrays: Arrays, at: Index) -> "_Joint":
    """Gives the program of what joins both sides of a pair, and the arrays it reads."""
    return locally(_joint, (program,), arrays, at)


@pytree("arrays", static=("program",))
class _Joint:
    """The result of `split`, as a tree of arrays."""

    program: Program
    arrays: Arrays


def _joint(program: Program, arrays: Arrays, at: Index) -> _Joint:
    program, arrays = split(program, arrays, at)
    return _Joint(arrays=arrays, program=program)
