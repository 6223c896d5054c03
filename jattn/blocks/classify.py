"""Which blocks of a mask are empty, partial or full, from its jaxpr alone.

A value that depends on one side only (the query, or the key) is computed exactly at
every position of that side, O(T + S), and summarized for each block. A value that depends
on both sides has only an interval for each pair of blocks (see `intervals`).

Intervals forget that two facts are about the same pair. So a mask is first written
as a disjunction of conjunctions of such facts. In each conjunction the one-sided facts
select rows and columns, the two-sided facts are evaluated on the selected rows and columns
only, and bounds on the same difference of positions must agree. A block is empty if every
conjunction of the mask is impossible there. It is full if every conjunction of the mask's
complement is impossible there.
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
from jattn.blocks.intervals import Interval, flushed, point, unknown


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
        offsets: t − row and s − column, where these are known numbers; else None.
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
        """Gives the number of blocks of queries and of blocks of keys."""
        rows, columns = self.row.shape[QUERY], self.column.shape[KEY]
        return -(-rows // self.block_q), -(-columns // self.block_kv)


def grid(
    sizes: tuple[int, int, int, int], blocks: tuple[int, int], query_position, key_position
) -> Grid:
    """Cuts an attention matrix in blocks.

    Args:
        sizes: B, N, T and S.
        blocks: How many queries and keys a block has; the last ones may have fewer.
        query_position: Positions of the queries, `T` or `BT`, in any order; or the
            position of the first one, a number; None for 0, 1, ….
        key_position: Positions of the keys, likewise.

    Returns:
        The grid.
    """
    # For each of the axes BNTS an array of its indices, which broadcasts to BNTS.
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
    """Gives the difference of positions and indices where it is known, else None."""
    position = concrete(0 if position is None else position)
    if not isinstance(position, np.ndarray) or position.ndim:
        return None
    # Beyond 2³⁰, positions may leave int32 and wrap around.
    return int(position) if abs(int(position)) < 2**30 else None


def _positions(position, index):
    if position is None:
        return index
    position = concrete(position)
    known, small = isinstance(position, np.ndarray), jnp.iinfo(np.int32)
    fits = known and np.all((position >= small.min) & (position <= small.max))
    # Positions that may need 64 bits keep them; `_leaf` makes them unknown in a function
    # of 32 bits.
    if fits or position.dtype.itemsize <= np.dtype(np.int32).itemsize:
        position = position.astype(np.int32)
    if position.ndim == 0:
        return index + position
    batch = position.shape[0] if position.ndim == 2 else 1
    return position.reshape(batch, *index.shape[1:])


def classify(jaxpr, arrays, points: Grid, aligned=()):
    """Says for every block whether a mask is empty, partial or full there.

    Sound: a block called empty has no True, and a block called full has no False. The
    result is a numpy array if everything is concrete, otherwise a traced array.

    Args:
        jaxpr: The mask, a jaxpr whose constants are `arrays` and whose inputs are scalars:
            b, n, t, s and an element of each aligned array.
        arrays: The arrays that the mask holds or closes over, concrete or traced.
        points: The pairs and their blocks.
        aligned: Arrays of four axes that broadcast to BNTS.

    Returns:
        0 empty, 1 partial, 2 full: int8, one axis each for examples, heads, query blocks
        and key blocks. An axis is 1 long if the mask does not depend on it.
    """
    # 0 where True is impossible, 1 where it is possible, 2 where it is also certain.
    definitely, possibly = evaluate(jaxpr, arrays, points, aligned)
    return possibly.astype(np.int8) + (definitely & possibly).astype(np.int8)


def dead_blocks(jaxpr, arrays, points: Grid, aligned=()):
    """Says for every block whether a modifier answers −∞ to every finite logit.

    Args:
        jaxpr: As in `classify`, but with the logit before b.
        arrays: See `classify`.
        points: See `classify`.
        aligned: See `classify`.

    Returns:
        Booleans of the shape that `classify` returns.
    """
    root, layout = _graph(jaxpr, arrays, points, aligned)
    if not may_be_infinite(root):
        return np.zeros((1, 1, 1, 1), bool)
    return Decision(layout, root).value(root).hi == -np.inf


def evaluate(jaxpr, arrays, points: Grid, aligned=()) -> Interval:
    """Bounds the values that a pointwise function can take on every block.

    Args:
        jaxpr: See `classify`; if it has a logit before b, that may be any finite number.
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
    # By array, so that t and the row are one node if they are one array.
    nodes: dict[Any, Node] = {}

    def field(array, dtype) -> Node:
        key = id(array), np.dtype(dtype)
        if key not in nodes:
            nodes[key] = _leaf(array, dtype)
        return nodes[key]

    given = [field(x, aval.dtype) for x, aval in zip(fields, avals[count:], strict=True)]
    inputs = [*map(_logit, avals[:count]), *given]
    (root,) = trace(jaxpr, inputs, [constant(array) for array in arrays])
    kind = avals[count].dtype  # the dtype of the indices
    places = [field(x, kind) for x in (points.t, points.s, points.row, points.column)]
    origins = zip(places, (*points.offsets, 0, 0), strict=True)
    layout = Layout(
        {QUERY: points.row, KEY: points.column},
        {QUERY: points.block_q, KEY: points.block_kv},
        {node: offset for node, offset in origins if offset is not None},
    )
    return root, layout


def _logit(aval) -> Node:
    # A logit may be any finite number.
    most = np.full((1, 1, 1, 1), jnp.finfo(aval.dtype).max, aval.dtype)
    return Node(None, (), frozenset(), Interval(-most, most))


def _leaf(array, dtype) -> Node:
    """Makes the node of an input, which depends on each side whose axis is not 1."""
    if not np.can_cast(array.dtype, dtype):  # the cast might change its numbers
        return Node(None, (), frozenset(), unknown(jax.ShapeDtypeStruct((), dtype)))
    sides = frozenset(side for side in (QUERY, KEY) if array.shape[side] != 1)
    return Node(None, (), sides, flushed(point(array.astype(dtype))))
