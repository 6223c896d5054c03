"""What each operand does as keys come by: it stays, it travels, or its columns are cut.

All of it follows from the shapes of the whole. What lies along the queries stays with
them; what lies along the keys travels with these. An array of both, such as a bias, is
cut by rows among the devices; each has all its columns, and cuts out those of the keys at
hand. What lies along neither, all devices have.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jattn.arrays.positions import spread_positions
from jattn.arrays.shapes import Sizes
from jattn.call.problem import Operands, Problem, drawn, index
from jattn.call.program import Arrays, Index, Program, trace
from jattn.context.place import Axes, Place
from jattn.implementations.blockwise.prepare import hoisted
from jattn.operations.varying import locally

STAYS, CUT = "stays", "is cut"  # else a number: it travels, its keys along that axis

leaves: Any = Arrays  # a tree like the arrays of a program, of other leaves


class Cut(NamedTuple):
    """The mesh axes that examples, heads, rows and columns of aligned arrays lie along."""

    batch: Axes
    heads: Axes
    rows: Axes
    columns: Axes

    def aligned(self, array) -> PartitionSpec:
        """Says how an array BNTS lies; all columns of one row are on one device."""
        B, N, T, S = array.shape
        columns = () if T > 1 and self.rows else self.columns
        axes = (self.batch, self.heads, self.rows, columns)
        sizes = zip(axes, (B, N, T, S), strict=True)
        return PartitionSpec(
            *(names if size > 1 and names else None for names, size in sizes)
        )


def cut_of(place: Place) -> Cut:
    """Says how aligned arrays lie after heads were exchanged."""
    heads = (*place.heads, *place.swapped)
    return Cut(place.batch, heads, place.rows, place.round)


def rows_spec(place: Place, axes: Axes) -> PartitionSpec:
    """Says how an array B × (T or S) × heads × size lies, its second axis along `axes`."""
    return PartitionSpec(*(names or None for names in (place.batch, axes, place.heads)))


def specs(operands: Any, place: Place) -> Any:
    """Says how each operand lies, as `jax.shard_map` asks."""
    cut = cut_of(place)

    def position(array, axes):
        if array is None or array.ndim == 0:
            return array if array is None else PartitionSpec()
        first = place.batch if array.shape[0] > 1 else ()
        return PartitionSpec(first or None, axes or None)

    def arrays(of: Arrays):
        captured = tuple(PartitionSpec() for _ in of.captured)
        return leaves(captured, tuple(map(cut.aligned, of.aligned)))

    queries = () if place.strategy == "merge" else place.axis
    return operands._replace(
        query=rows_spec(place, queries),
        key=rows_spec(place, place.axis),
        value=rows_spec(place, place.axis),
        scale=PartitionSpec(),
        bias=None if operands.bias is None else cut.aligned(operands.bias),
        mask=arrays(operands.mask),
        modifier=arrays(operands.modifier),
        query_position=position(operands.query_position, place.rows),
        key_position=position(operands.key_position, place.round),
        rng=jax.tree.map(cut.aligned, operands.rng),
    )


def ways(operands: Any) -> tuple:
    """Says what each leaf of the operands does, in their order."""

    def aligned(array):
        _, _, T, S = array.shape
        return STAYS if S == 1 else 3 if T == 1 else CUT

    def arrays(of: Arrays):
        return leaves(tuple(STAYS for _ in of.captured), tuple(map(aligned, of.aligned)))

    found = operands._replace(
        query=STAYS,
        key=1,
        value=1,
        scale=STAYS,
        bias=None if operands.bias is None else aligned(operands.bias),
        mask=arrays(operands.mask),
        modifier=arrays(operands.modifier),
        query_position=STAYS,
        key_position=1,
        rng=None if operands.rng is None else (STAYS, 3),
    )
    return tuple(jax.tree.leaves(found))


def prepare(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """Gives the whole call with all that devices count, draw and hoist, as arrays.

    What is a part knows neither its positions nor the numbers of its examples and heads:
    so each query and key brings its position along, and b and n are arrays aligned with
    the inputs where a program of pairs still reads them.
    """
    at = index(problem, operands)
    rng = operands.rng
    if rng is not None:
        rng = locally(drawn, (problem,), operands._replace(**_NOT_DRAWN), at)
    for name in ("mask", "modifier"):
        program, arrays = getattr(problem, name), getattr(operands, name)
        if program is not None:
            logit = None if name == "mask" else problem.wide
            found = hoisted(program, arrays, at)
            program, arrays = _numbered(found.program, found.arrays, at, logit)
            changed: dict[str, Any] = {name: program}
            problem = dataclasses.replace(problem, **changed)
            changed = {name: arrays}
            operands = operands._replace(**changed)
    problem = dataclasses.replace(
        problem, blocks=None, settled=False, named=None, examples=None
    )
    return problem, operands._replace(
        query_position=spread_positions(operands.query_position, problem.sizes.T),
        key_position=spread_positions(operands.key_position, problem.sizes.S),
        rng=rng,
        kinds=None,
    )


# What dropout's words do not depend on.
_NOT_DRAWN: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value", "scale", "bias", "kinds")),
    **dict.fromkeys(("mask", "modifier"), Arrays()),
}


def _numbered(program: Program, arrays: Arrays, at: Index, logit):
    """Gives the program with b and n read from aligned arrays, if it reads them."""
    lead = 0 if logit is None else 1
    if not any(program.used[lead : lead + 2]):
        return program, arrays

    def numbered(*scalars):
        front, (_, _, t, s, *elements) = scalars[:lead], scalars[lead:]
        *elements, b, n = elements
        inputs = (*front, b, n, t, s, *elements)
        (result,) = jax.core.eval_jaxpr(program.jaxpr, arrays.captured, *inputs)
        return result

    b = jnp.broadcast_to(at.b, (at.b.shape[0], 1, 1, 1))
    return trace("context", numbered, (*arrays.aligned, b, at.n), logit)


def part_of(problem: Problem, place: Place) -> Problem:
    """Gives the problem of one device, after heads were exchanged."""
    sizes, heads = problem.sizes, place.count((*place.heads, *place.swapped))
    kv_heads = max(sizes.K // place.count(place.heads) // place.count(place.swapped), 1)
    sizes = Sizes(
        batch=(sizes.B // place.count(place.batch),),
        T=sizes.T // place.count(place.rows),
        S=sizes.S // place.count(place.round),
        N=sizes.N // heads,
        K=kv_heads,
        H=sizes.H,
        D=sizes.D,
    )
    given = problem.given | {"positions", "logsumexp"}
    return dataclasses.replace(problem, sizes=sizes, given=given)
