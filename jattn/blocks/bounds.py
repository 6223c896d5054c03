"""Bounds that a conjunction sets on sums of positions, such as t − s.

Two comparisons of one t − s concern the same pair: each may hold somewhere in a block, but
both together nowhere, such as t ≥ s + 2 and t ≤ s. And where the bounds leave a band of
t − s, it passes through only some rows and columns of a block.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jattn.blocks.formulas import Literal
from jattn.blocks.graph import KEY, QUERY, Node
from jattn.blocks.intervals import Interval, apply, extremes, namespace
from jattn.blocks.sums import linear, name_of, sums

FALSE, TRUE = np.zeros((1, 1, 1, 1), bool), np.ones((1, 1, 1, 1), bool)

# The most traced terms of a sum of integers. More of them count as far away, so that the
# sum cannot wrap around.
_MANY_TERMS = 8


class Layout(NamedTuple):
    """The sides of the attention matrix, and how they are cut in blocks.

    Attributes:
        indices: The row indices and the column indices, by side.
        sizes: How many queries and keys a block has, by side.
        origins: For nodes that are positions, what to subtract to get the index.
    """

    indices: dict[int, np.ndarray]
    sizes: dict[int, int]
    origins: dict[Node, int]


class Bounds(NamedTuple):
    """Bounds lo ≤ Σ count · node ≤ hi, from some literals of a term.

    The bounds are integers of 64 bits if the nodes have 64, otherwise of 32 bits. They may
    differ by example and head. A bound of ±`far`, a quarter of the range of the type,
    stands for no bound.
    """

    form: dict[Node, int]
    lo: Any
    hi: Any
    literals: tuple[Literal, ...]

    def may_contradict(self) -> bool:
        """Says whether no number may be left between the bounds."""
        crossed = self.lo > self.hi
        return not _is_known(crossed) or bool(np.any(crossed))

    def holds_zero(self) -> bool:
        """Says whether 0 is surely within the bounds."""
        inside = (self.lo <= 0) & (self.hi >= 0)
        return _is_known(inside) and bool(np.all(inside))

    def wraps(self, selection):
        """Says on which blocks an operand of a comparison may have wrapped around."""
        nodes = sums(*(x for node, _ in self.literals for x in node.operands))
        return functools.reduce(operator.or_, (_wraps(x, selection) for x in nodes), FALSE)

    def band(self, layout: Layout):
        """Returns bounds on row − column if these are bounds on t − s, else None."""
        order = sorted(self.form.items(), key=lambda item: sorted(item[0].sides))
        # A band of t − s needs exactly one position of each side, with opposite signs.
        if [count for _, count in order] not in ([1, -1], [-1, 1]):
            return None
        (x, count), (y, _) = order
        sides = x.sides | y.sides
        if sides != {QUERY, KEY} or not {x, y} <= layout.origins.keys():
            return None
        lo, hi = (self.lo, self.hi) if count > 0 else (-self.hi, -self.lo)
        offset, far = layout.origins[x] - layout.origins[y], _far(self.lo.dtype)
        if abs(offset) >= far:
            return None
        # No |row − column| is as large as T + S, so that stands for no bound.
        reach = sum(index.size for index in layout.indices.values())
        xp = namespace(lo, hi)
        ends = (
            xp.where(lo <= -far, -reach, lo - offset),
            xp.where(hi >= far, reach, hi - offset),
        )
        return [xp.clip(end, -reach, reach).astype(np.int32) for end in ends]


# For a comparison x ? y of integers that holds (True) or not: the bounds on x − y.
_LIMITS = {
    ("lt", True): (None, -1),
    ("lt", False): (0, None),
    ("le", True): (None, 0),
    ("le", False): (1, None),
    ("gt", True): (1, None),
    ("gt", False): (None, 0),
    ("ge", True): (0, None),
    ("ge", False): (None, -1),
    ("eq", True): (0, 0),
}


def find_bounds(literals: Iterable[Literal]) -> list[Bounds]:
    """Returns the bounds that comparisons of integers set, one for each sum of nodes."""
    result: dict[Any, Bounds] = {}
    for node, positive in literals:
        limits = _LIMITS.get((name_of(node) or "", positive))
        if limits is None or not _compares_integers(node):
            continue
        x, y = node.operands
        form, known = linear({x: 1, y: -1} if x is not y else {x: 0})
        # Bounds have 64 bits if the compared integers do, otherwise 32.
        wide = node.operation.operands[0].dtype.itemsize == np.dtype(np.int64).itemsize
        kind = np.int64 if wide else np.int32
        lo, hi = _ends(limits, known, kind)
        # Bounds on y − x are bounds on x − y with the opposite sign, in the other order.
        key = frozenset((node, count) for node, count in form.items() if count)
        opposite = frozenset((node, -count) for node, count in key)
        if (opposite, kind) in result:
            key, lo, hi = opposite, -hi, -lo
        old = result.get((key, kind))
        if old is not None:
            xp = namespace(lo, hi, old.lo, old.hi)
            lo, hi = xp.maximum(lo, old.lo), xp.minimum(hi, old.hi)
        # The literals are kept, to know which ones the bounds stand for.
        before = () if old is None else old.literals
        result[key, kind] = Bounds(dict(key), lo, hi, (*before, (node, positive)))
    return list(result.values())


def joins_sides(literal: Literal) -> bool:
    """Says whether a literal is an equation of a query's value and a key's value."""
    node, positive = literal
    if not positive or name_of(node) != "eq" or not _compares_integers(node):
        return False
    sides = [x.sides for x in node.operands if x.dense is not None]
    return sorted(map(tuple, sides)) == [(QUERY,), (KEY,)]


def _compares_integers(node: Node) -> bool:
    aval = node.operation.operands[0]
    return not aval.shape and jnp.issubdtype(aval.dtype, jnp.integer)


def _is_known(array) -> bool:
    return isinstance(array, np.ndarray | np.generic)


def _far(kind) -> int:
    # A quarter of the range of the type.
    return 2 ** (8 * np.dtype(kind).itemsize - 2)


def _ends(limits, known: list, kind) -> list:
    """Returns the bounds limit − Σ count · array of both limits; ±far where it is None."""
    far = _far(kind)
    total, is_near = _total(known, kind, far)
    ends: list[Any] = []
    for limit, none in zip(limits, (-far, far), strict=True):
        if limit is None:
            ends.append(np.full(TRUE.shape, none, kind))
        elif _is_known(total):
            ends.append(np.clip(limit - total, -far, far).astype(kind))
        else:
            ends.append(jnp.where(is_near, limit - total, none).astype(kind))
    return ends


def _total(known: list, kind, far: int):
    """Returns the sum, and where it is nearer than `far`.

    Concrete terms are added as Python's integers, which do not wrap around. Traced terms
    are added in the type `kind`. A traced term counts as near only if it is so small that
    the sum of `_MANY_TERMS` such terms does not wrap.
    """
    total: Any = np.zeros(TRUE.shape, object)
    traced = []
    for count, array in known:
        if _is_known(array):
            total = total + count * _whole(array)
        elif count:
            traced.append((count, array))
    if not traced:
        return total, True
    most = far // (2 * _MANY_TERMS)
    is_near: Any = (abs(total) < far // 2).astype(bool)
    total = np.clip(total, -far, far).astype(kind)
    if sum(abs(count) for count, _ in traced) > _MANY_TERMS:
        return jnp.asarray(total), False
    for count, array in traced:
        if array.dtype.itemsize >= np.dtype(kind).itemsize:
            is_near = (
                is_near & (array < most) & ~(array < -most if _signed(array) else False)
            )
        total = total + count * array.astype(kind)
    return total, is_near


def _whole(array):
    """Returns known integers as Python's; those of int4 by way of a type of NumPy."""
    return (array if array.dtype.kind in "iu" else array.astype(np.int8)).astype(object)


def _signed(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.signedinteger)


def _wraps(node: Node, selection):
    """Says on which blocks a sum of two values may have left its type."""
    # The sum with 0 is another object than `lo`, so a single value becomes an interval of
    # two bounds: the rule for single values would let the sum wrap.
    values = [selection.value(x) for x in node.operands]
    zero = node.operation.result.dtype.type(0)  # a Python 0 would widen int4
    lo, hi = apply(node.operation, [Interval(lo, hi + zero) for lo, hi in values])
    least, most = extremes(lo.dtype)
    return (lo == least) & (hi == most)
