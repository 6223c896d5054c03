"""A call as the operation takes it: dropout's words drawn, one-sided work done once."""

import dataclasses

import jax.numpy as jnp

from jattn.blocks import of_call
from jattn.call.hoist import split
from jattn.call.problem import Operands, Problem, apart, drawn, index
from jattn.call.program import Arrays, Index, Program
from jattn.implementations.blockwise.plan import granularity, tile_sizes
from jattn.operations.varying import locally
from jattn.pytree import pytree


def prepare(problem: Problem, operands: Operands, tile: tuple[int, int] | None = None):
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


def _split(problem: Problem, operands: Operands, blocks: tuple[int, int]):
    """The call with what reads one side of a pair evaluated once, not in every pair.

    Which tiles are empty is found before, for positions say more than arrays of them.
    """
    at, parts = index(problem, operands), {}
    for name in ("mask", "modifier"):
        program, arrays = getattr(problem, name), getattr(operands, name)
        if program is not None:
            found = hoisted(program, arrays, at)
            if len(found.arrays.aligned) > len(arrays.aligned):
                parts[name] = found
    if not parts or not problem.sizes.are_known:
        return problem, operands
    kinds = of_call.block_table(problem, operands, *blocks)
    programs = {name: found.program for name, found in parts.items()}
    arrays = {name: found.arrays for name, found in parts.items()}
    problem = dataclasses.replace(problem, blocks=blocks, settled=True, **programs)
    return problem, operands._replace(kinds=jnp.asarray(kinds), **arrays)


def hoisted(program: Program, arrays: Arrays, at: Index) -> "_Joint":
    """The program of what joins both sides of a pair, and the arrays that it reads."""
    return locally(_joint, (program,), arrays, at)


@pytree("arrays", static=("program",))
class _Joint:
    """What `split` gives, as a tree of arrays."""

    program: Program
    arrays: Arrays


def _joint(program: Program, arrays: Arrays, at: Index) -> _Joint:
    program, arrays = split(program, arrays, at)
    return _Joint(arrays=arrays, program=program)
