"""Which blocks of a mask are empty, partial or full, from its jaxpr alone.

A value that looks at one side only (the query, or the key) is computed exactly at
every position of that side, O(T + S), and summarized per block. Where both sides
meet there are only intervals, one per pair of blocks (see `intervals`).

Intervals forget that two facts are about the same pair. So a mask is first written
as a disjunction of conjunctions of such facts: in each, the one-sided facts select
rows and columns, the two-sided ones are evaluated on the selected ones alone, and
bounds on the same difference of positions must agree. A block is empty if every
conjunction is impossible there, and full if the complement's all are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.blocks.bounds import Layout
from jattn.blocks.decide import Decision
from jattn.blocks.graph import KEY, QUERY, Node, concrete, constant, trace
from jattn.blocks.infinite import may_be_infinite
from jattn.blocks.intervals import Interval, point, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The pairs of positions that a mask is asked about, cut in blocks.

    Block i of the queries holds the rows [i · block_q, min((i + 1) · block_q, T)).

    Attributes:
        b: Indices of the examples, shaped (B, 1, 1, 1).
        n: Indices of the heads, (1, N, 1, 1).
        t: Positions of the queries, (B or 1, 1, T, 1).
        s: Positions of the keys, (B or 1, 1, 1, S).
        row: Indices of the queries, (1, 1, T, 1); the same object as t by default.
        column: Indices of the keys, (1, 1, 1, S).
        block_q: How many queries a block has.
        block_kv: How many keys a block has.
        offsets: Of t from row and of s from column, where they are known numbers.
    """

    b: Any
    n: Any
    t: Any
    s: Any
    row: Any
    column: Any
    block_q: int
    block_kv: int
    offsets: tuple[int | None, int | None] = (None, None)

    @property
    def shape(self) -> tuple[int, int]:
        """How many blocks of queries and of keys there are."""
        rows, columns = self.row.shape[QUERY], self.column.shape[KEY]
        return -(-rows // self.block_q), -(-columns // self.block_kv)


def grid(
    sizes: tuple[int, int, int, int], blocks: tuple[int, int], query_position, key_position
) -> Grid:
    """Cuts an attention matrix in blocks.

    Args:
        sizes: B, N, T and S.
        blocks: How many queries and keys a block has; the last ones may have fewer.
        query_position: Positions of the queries, `T` or `BT`, in any order; or a number to
            add to 0…; None is 0… itself.
        key_position: Positions of the keys, likewise.

    Returns:
        The grid.
    """
    index = lambda axis: np.arange(sizes[axis], dtype=np.int32).reshape(
        [-1 if i == axis else 1 for i in range(4)]
    )
    b, n, row, column = map(index, range(4))
    return Grid(
        b,
        n,
        _positions(query_position, row),
        _positions(key_position, column),
        row,
        column,
        *blocks,
        (_offset(query_position), _offset(key_position)),
    )


def _offset(position) -> int | None:
    """By how much positions differ from indices, where that is known."""
    position = concrete(0 if position is None else position)
    if not isinstance(position, np.ndarray) or position.ndim:
        return None
    # Farther out, positions may wrap around.
    return int(position) if abs(int(position)) < 2**30 else None


def _positions(position, index):
    if position is None:
        return index
    position = concrete(position)
    known, small = isinstance(position, np.ndarray), jnp.iinfo(np.int32)
    fits = known and np.all((position >= small.min) & (position <= small.max))
    # What has 64 bits and may need them keeps them, and is unknown to a function of 32.
    if fits or position.dtype.itemsize <= np.dtype(np.int32).itemsize:
        position = position.astype(np.int32)
    if position.ndim == 0:
        return index + position
    batch = position.shape[0] if position.ndim == 2 else 1
    return position.reshape(batch, *index.shape[1:])


def classify(jaxpr, arrays, points: Grid, aligned=()):
    """Says of every block whether a mask is empty, partial or full there.

    Sound: a block called empty has no True, and one called full no False. The result is
    numpy's if everything is concrete, and an array in the graph if not.

    Args:
        jaxpr: The mask, a jaxpr whose constants are `arrays` and whose inputs are scalars:
            b, n, t, s and an element of each aligned array.
        arrays: What the mask holds or closes over, concrete or traced.
        points: Where to evaluate it.
        aligned: Arrays of four axes that broadcast to BNTS.

    Returns:
        0 empty, 1 partial, 2 full: int8, one axis each for examples, heads, query blocks
        and key blocks; 1 long where the mask does not depend on it.
    """
    definitely, possibly = evaluate(jaxpr, arrays, points, aligned)
    return possibly.astype(np.int8) + (definitely & possibly).astype(np.int8)


def dead_blocks(jaxpr, arrays, points: Grid, aligned=()):
    """Says of every block whether a modifier answers −∞ to every finite logit.

    Args:
        jaxpr: As in `classify`, but with the logit before b.
        arrays: See `classify`.
        points: See `classify`.
        aligned: See `classify`.

    Returns:
        Booleans, shaped as `classify`'s.
    """
    root, layout = _graph(jaxpr, arrays, points, aligned)
    if not may_be_infinite(root):
        return np.zeros((1, 1, 1, 1), bool)
    return Decision(layout, root).value(root).hi == -np.inf


def evaluate(jaxpr, arrays, points: Grid, aligned=()) -> Interval:
    """The values that a pointwise function can take on every block.

    Args:
        jaxpr: See `classify`; with a logit before b, this may be any finite number.
        arrays: See `classify`.
        points: See `classify`.
        aligned: See `classify`.

    Returns:
        The bounds, with axes for examples, heads, query blocks and key blocks.
    """
    root, layout = _graph(jaxpr, arrays, points, aligned)
    return Decision(layout, root).value(root)


def _graph(jaxpr, arrays, points: Grid, aligned) -> tuple[Node, Layout]:
    """Returns a pointwise function as a graph, and how its sides are cut."""
    fields = points.b, points.n, points.t, points.s, *map(concrete, aligned)
    avals = [var.aval for var in jaxpr.invars]
    count = len(avals) - len(fields)
    nodes: dict[Any, Node] = {}  # t and the row are one node where they are one array

    def field(array, dtype) -> Node:
        key = id(array), np.dtype(dtype)
        if key not in nodes:
            nodes[key] = _leaf(array, dtype)
        return nodes[key]

    given = [field(x, aval.dtype) for x, aval in zip(fields, avals[count:], strict=True)]
    inputs = [*map(_logit, avals[:count]), *given]
    (root,) = trace(jaxpr, inputs, [constant(array) for array in arrays])
    kind = avals[count].dtype  # of the indices
    places = [field(x, kind) for x in (points.t, points.s, points.row, points.column)]
    origins = zip(places, (*points.offsets, 0, 0), strict=True)
    layout = Layout(
        {QUERY: points.row, KEY: points.column},
        {QUERY: points.block_q, KEY: points.block_kv},
        {node: offset for node, offset in origins if offset is not None},
    )
    return root, layout


def _logit(aval) -> Node:
    most = np.full((1, 1, 1, 1), jnp.finfo(aval.dtype).max, aval.dtype)
    return Node(None, (), frozenset(), Interval(-most, most))


def _leaf(array, dtype) -> Node:
    """An input; the sides that it looks at are those that it is long in."""
    if not np.can_cast(array.dtype, dtype):  # it would be cut, who knows how
        return Node(None, (), frozenset(), unknown(jax.ShapeDtypeStruct((), dtype)))
    sides = frozenset(side for side in (QUERY, KEY) if array.shape[side] != 1)
    return Node(None, (), sides, point(array.astype(dtype)))
