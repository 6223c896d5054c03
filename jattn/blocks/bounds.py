"""Bounds that a conjunction sets on sums of positions, such as t − s.

They must agree: on many a block t ≥ s + 2 is possible and t ≤ s is, but never both.
And where they leave a band of t − s, it passes through some rows and columns alone.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jattn.blocks.graph import KEY, QUERY, Node
from jattn.blocks.intervals import Interval, apply, extremes

FALSE, TRUE = np.zeros((1, 1, 1, 1), bool), np.ones((1, 1, 1, 1), bool)

Literal = tuple[Node, bool]  # A node, and whether it holds.
Term = frozenset[Literal]  # Literals, all of which hold.


class Layout(NamedTuple):
    """How the sides of the attention matrix are cut.

    Attributes:
        indices: The row and the column indices, one per side.
        sizes: How many queries and keys a block has, per side.
        origins: What to subtract from a node, a position, to have its index.
    """

    indices: dict[int, np.ndarray]
    sizes: dict[int, int]
    origins: dict[Node, int]


class Bounds(NamedTuple):
    """lo ≤ Σ count · node ≤ hi, from some literals of a term.

    The bounds may differ by example and head.
    """

    form: dict[Node, int]
    lo: Any
    hi: Any
    literals: Term

    def wraps(self, selection):
        """Returns on which blocks a side of a comparison may have wrapped around."""
        nodes = {x for node, _ in self.literals for x in node.operands}
        return functools.reduce(operator.or_, (_wraps(x, selection) for x in nodes))

    def band(self, layout: Layout):
        """Returns bounds on row − column, if that is what they are on."""
        order = sorted(self.form.items(), key=lambda item: sorted(item[0].sides))
        if [count for _, count in order] not in ([1, -1], [-1, 1]):
            return None
        (x, count), (y, _) = order
        sides = x.sides | y.sides
        if sides != {QUERY, KEY} or not {x, y} <= layout.origins.keys():
            return None
        ends = (self.lo, self.hi) if count > 0 else (-self.hi, -self.lo)
        offset = layout.origins[x] - layout.origins[y]
        reach = sum(index.size for index in layout.indices.values())
        return [np.clip(end - offset, -reach, reach).astype(np.int32) for end in ends]


_LIMITS = {
    ("lt", True): (-np.inf, -1),
    ("lt", False): (0, np.inf),
    ("le", True): (-np.inf, 0),
    ("le", False): (1, np.inf),
    ("gt", True): (1, np.inf),
    ("gt", False): (-np.inf, 0),
    ("ge", True): (0, np.inf),
    ("ge", False): (-np.inf, -1),
    ("eq", True): (0, 0),
}


def find_bounds(term: Term) -> list[Bounds]:
    """Returns the bounds that comparisons of integers set, one per sum."""
    result: dict[frozenset, Bounds] = {}
    for node, positive in term:
        limits = _LIMITS.get((_name(node) or "", positive))
        if limits is None or not _compares_integers(node):
            continue
        form = _linear(node.operands[0], 1, _linear(node.operands[1], -1, {None: 0}))
        offset = np.asarray(form.pop(None), float)
        lo, hi = (limit - offset for limit in limits)
        key = frozenset((node, count) for node, count in form.items() if count)
        opposite = frozenset((node, -count) for node, count in key)
        if opposite in result:
            key, lo, hi = opposite, -hi, -lo
        old = result.get(key, Bounds({}, -np.inf, np.inf, frozenset()))
        lo, hi = np.maximum(lo, old.lo), np.minimum(hi, old.hi)
        result[key] = Bounds(dict(key), lo, hi, old.literals | {(node, positive)})
    return list(result.values())


def joins_sides(literal: Literal) -> bool:
    """Returns whether a literal equates values of the two sides."""
    node, positive = literal
    if not positive or _name(node) != "eq" or not _compares_integers(node):
        return False
    sides = [x.sides for x in node.operands if x.dense is not None]
    return sorted(map(tuple, sides)) == [(QUERY,), (KEY,)]


def _name(node: Node) -> str | None:
    return node.operation.name if node.operation else None


def _compares_integers(node: Node) -> bool:
    # Of 32 bits at most: floats must hold the bounds exactly.
    aval = node.operation.operands[0]
    is_integer = jnp.issubdtype(aval.dtype, jnp.signedinteger)
    return not aval.shape and is_integer and aval.dtype.itemsize <= 4


def _linear(node: Node, sign: int, form: dict) -> dict:
    """Adds ±node to a sum of nodes and of what is known, whose key is None."""
    name = _name(node)
    if name in ("add", "sub"):
        x, y = node.operands
        return _linear(y, sign if name == "add" else -sign, _linear(x, sign, form))
    lo, hi = node.dense or (None, None)
    known = lo is hi and isinstance(lo, np.ndarray) and not node.sides
    key, value = (None, sign * lo.astype(float)) if known else (node, sign)
    return form | {key: form.get(key, 0) + value}


def _wraps(node: Node, selection):
    """Returns on which blocks a sum may have left its type."""
    if _name(node) not in ("add", "sub"):
        return FALSE
    # Two bounds, even of a single value: the rule for single values lets them wrap.
    values = [selection.value(x) for x in node.operands]
    lo, hi = apply(node.operation, [Interval(lo, hi + 0) for lo, hi in values])
    least, most = extremes(lo.dtype)
    wraps = [_wraps(x, selection) for x in node.operands]
    return functools.reduce(operator.or_, wraps, (lo == least) & (hi == most))
