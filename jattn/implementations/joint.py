"""What joins a query and a key, as kernels read it: programs and aligned arrays.

A mask or a modifier is split into what depends on one side of a pair, which becomes an
array of its rows or columns, and a program of scalars that a kernel evaluates on a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jattn.blocks import of_call
from jattn.blocks.kinds import cut_last, spread
from jattn.call.hoist import joint_equations, split
from jattn.call.jaxprs import CALLS, RULES, called
from jattn.call.problem import Operands, Problem, index
from jattn.call.program import Program


class Extras(NamedTuple):
    """Arrays that masks, modifiers, bias and dropout read, aligned with BNTS, or None."""

    index: tuple  # b, n, t, s
    mask: tuple
    modifier: tuple
    bias: jax.Array | None
    words: Any  # random words of dropout, for queries and for keys


class Pairs(NamedTuple):
    """Programs that join a query and a key, and which positions are counted from 0."""

    mask: Program | None
    modifier: Program | None
    counts_keys: bool  # positions of keys are 0, 1, 2, …
    counts: bool  # positions of both queries and keys are


def extras(problem: Problem, operands: Operands) -> tuple[Pairs, Extras]:
    """Splits the mask and the modifier of a call; differentiable in the operands.

    Gives the programs that join a query and a key, and the arrays that they read.
    """
    at = index(problem, operands)
    mask, modifier, used = None, None, (False,) * 4
    mask_arrays = modifier_arrays = ()
    if problem.mask is not None:
        mask, arrays = split(problem.mask, operands.mask, at)
        mask_arrays, used = arrays.aligned, mask.used[:4]
    if problem.modifier is not None:
        modifier, arrays = split(problem.modifier, operands.modifier, at)
        modifier_arrays = arrays.aligned
        used = tuple(x or y for x, y in zip(used, modifier.used[1:5], strict=True))
    counts_keys = operands.key_position is None
    used = (*used[:3], used[3] and not counts_keys)
    at = tuple(x if flag else None for x, flag in zip(at, used, strict=True))
    counts = counts_keys and operands.query_position is None
    pairs = Pairs(mask, modifier, counts_keys, counts)
    return pairs, Extras(at, mask_arrays, modifier_arrays, operands.bias, operands.rng)


def kind(array) -> str:
    """Says whether an array aligned with BNTS is a row, column or tile of each block."""
    if array.shape[3] == 1:
        return "row"
    return "column" if array.shape[2] == 1 else "tile"


def objection(equations, taken, dtypes) -> str | None:
    """Says in a clause why a kernel cannot evaluate the equations; None if it can.

    `taken` are the primitives that it evaluates, and `dtypes(name)` gives the dtypes of
    their scalars.
    """
    for equation in equations:
        name = equation.primitive.name
        inner = called(equation, CALLS | RULES)
        if inner is not None:
            if inner[1]:
                return f"`{name}` with an array of its own"
            found = objection(inner[0].eqns, taken, dtypes)
            if found:
                return found
            continue
        avals = [x.aval for x in (*equation.invars, *equation.outvars)]
        if name not in taken or any(x.shape for x in avals):
            return f"`{name}`"
        foreign = {x.dtype.name for x in avals} - dtypes(name)
        if foreign:
            return f"`{name}` of {min(foreign)}"
    return None


def objection_to_sizes(problem: Problem) -> str | None:
    """Says why no kernel can be written for the sizes of a call; None if one can."""
    sizes = problem.sizes
    if not all(isinstance(size, int) for size in (*sizes.BNTS, sizes.K)):
        return "needs sizes that are numbers; these are symbols."
    if 0 in (*sizes.BNTS, sizes.H, sizes.D):
        return "needs at least one query, key and number in each."
    if max(sizes.H, sizes.D) > 256:
        return f"takes head sizes up to 256, got H={sizes.H} and D={sizes.D}."
    return None


def objection_to_programs(problem: Problem, objection: Callable) -> str | None:
    """Says why a kernel cannot evaluate the mask or the modifier; None if it can.

    `objection` says it of the equations that join a query and a key, in a clause.
    """
    for name in ("mask", "modifier"):
        program = getattr(problem, name)
        if program is None:
            continue
        equations = joint_equations(program, logit=name == "modifier")
        if _indexes(equations):
            where = "a Boolean mask" if name == "mask" else "a `bias`"
            return (
                f"the {name} joins queries and keys by an array that both index, which a "
                f"kernel cannot read; it takes an array of queries × keys as {where}, and "
                f"arrays that only queries or only keys index."
            )
        found = objection(equations)
        if found:
            return (
                f"the {name} joins queries and keys by {found}, which a kernel cannot "
                f"evaluate; it can where only queries or only keys are indexed."
            )
    return None


def _indexes(equations) -> bool:
    """Says whether an array is indexed in one of the equations, or in what they call."""
    inside = (called(equation, CALLS | RULES) for equation in equations)
    return any(e.primitive.name in ("gather", "dynamic_slice") for e in equations) or any(
        _indexes(inner[0].eqns) for inner in inside if inner is not None
    )


def block_kinds(problem: Problem, operands: Operands, blocks: tuple[int, int]):
    """Gives the kind of each block; the last keys are partial if some are padding."""
    lengths = problem.sizes.T, problem.sizes.S
    kinds = spread(of_call.block_table(problem, operands, *blocks), lengths, blocks)
    return kinds if lengths[1] % blocks[1] == 0 else cut_last(kinds)


def distances(jaxpr, floats: dict, same_shape: Callable = lambda *xs: xs) -> dict:
    """Finds the floats that a jaxpr makes of a sum or difference of two small integers.

    `floats` has small integers as floats: the sum of two is exact in float32, and takes
    fewer instructions than a conversion at each pair. `same_shape` gives two of them the
    same shape.
    """
    sums, found = {}, {}
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0]
        is_float = out.aval.dtype == jnp.float32
        operands = [x for x in equation.invars if not isinstance(x, Literal)]
        if len(operands) < len(equation.invars):
            continue
        if name in ("add", "sub") and all(x in floats for x in operands):
            sums[out] = getattr(lax, name)(*same_shape(*(floats[x] for x in operands)))
        elif name in ("abs", "neg") and operands[0] in sums:
            sums[out] = getattr(lax, name)(sums[operands[0]])
        elif name == "convert_element_type" and operands[0] in sums and is_float:
            found[out] = sums[operands[0]]
    return found


def read_cotangents(
    problem: Problem, operands: Operands, flags: Extras, cotangents, arrange: Callable
):
    """Computes the cotangents of the operands that modifier and bias are made of.

    A kernel gives the cotangents of the arrays that it reads, arranged as `arrange` does
    it. They are pulled back through `extras`, which makes these arrays from the operands.
    """

    def read(modifier, bias):
        _, read = extras(problem, operands._replace(modifier=modifier, bias=bias))
        active = [(x.modifier, x.bias) for x in (read, flags)]
        leaves = zip(*map(jax.tree.leaves, active), strict=True)
        return [arrange(x) for x, flag in leaves if flag]

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


def wanted_extras(shapes: Extras, wanted: Operands) -> Extras:
    """Says which of the arrays that the kernel reads need a cotangent."""
    mark = lambda tree, want: jax.tree.map(
        lambda x: want and jnp.issubdtype(x.dtype, jnp.floating), tree
    )
    nothing = mark(shapes, False)
    modifier = any(jax.tree.leaves(wanted.modifier))
    return nothing._replace(
        modifier=mark(shapes.modifier, modifier), bias=mark(shapes.bias, bool(wanted.bias))
    )
