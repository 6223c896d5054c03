"""Decides Booleans on all pairs of blocks at once, from the graph of a mask.

A Boolean is written as a disjunction of conjunctions of literals. In a conjunction
the one-sided literals select rows and columns; the two-sided ones are evaluated on
intervals over the selected ones alone; and bounds on the same sum of positions must
agree. What no conjunction can satisfy is impossible; what the complement's cannot
is certain.
"""

import functools
import itertools
import operator
from typing import Any

import numpy as np

from jattn.blocks.bounds import (
    FALSE,
    TRUE,
    Bounds,
    Layout,
    Literal,
    Term,
    find_bounds,
    joins_sides,
)
from jattn.blocks.graph import KEY, QUERY, Node, size
from jattn.blocks.intervals import Interval, apply, extremes, namespace, point, unknown
from jattn.blocks.rearrange import range_extreme

_MAX_TERMS = 32
_MAX_SIZE = 2**26  # Of a value with axes of its own, over all blocks.


# Values on blocks, where only some rows and columns are selected.


class _Selection:
    """The values of nodes on every block, on its selected rows and columns."""

    def __init__(self, layout: Layout, masks=None, ranges=None, decide=None):
        self.layout = layout
        self.masks = masks or {}  # Of the positions, per side.
        self.ranges = ranges or {}  # Of rows and columns, narrower than the blocks.
        self.operand = decide or self.value
        self.memo: dict[Node, Interval] = {}

    def is_inhabited(self):
        """Returns on which blocks anything is selected."""
        anywhere = [self._reduced(mask, "any") for mask in self.masks.values()]
        return functools.reduce(operator.and_, anywhere, TRUE)

    def value(self, node: Node) -> Interval:
        """Returns the values of a node."""
        if node not in self.memo:
            if node.dense is not None:
                self.memo[node] = self.summary(node.dense, node.sides)
            else:
                operands = [self.operand(x) for x in node.operands]
                fits = size(operands, node.operation.result) <= _MAX_SIZE
                result = node.operation.result
                value = apply(node.operation, operands) if fits else unknown(result)
                self.memo[node] = value
        return self.memo[node]

    def summary(self, x: Interval, sides) -> Interval:
        """Returns the extremes of a one-sided value over the selected positions."""
        if not sides:
            return x
        lo, hi = x
        mask = self.masks.get(tuple(sides))
        if mask is not None:
            least, most = extremes(lo.dtype)
            mask = mask.reshape(mask.shape + (1,) * (lo.ndim - mask.ndim))
            xp = namespace(mask, lo, hi)
            lo, hi = xp.where(mask, lo, most), xp.where(mask, hi, least)
        side = min(sides)
        is_single = len(sides) == 1 and lo.ndim == TRUE.ndim and lo.shape[side] > 1
        if side in self.ranges and is_single:
            return Interval(self._within(lo, side, "min"), self._within(hi, side, "max"))
        return Interval(self._reduced(lo, "min"), self._reduced(hi, "max"))

    def _reduced(self, array, extreme: str):
        for side, block in self.layout.sizes.items():
            array = per_block(array, side, block, extreme)
        return array

    def _within(self, array, side: int, extreme: str):
        """Returns the extremes over a range of one side per pair of blocks."""
        examples, heads = array.shape[:2]
        parts = [
            point(np.arange(examples, dtype=np.int32).reshape(-1, 1, 1, 1)),
            point(np.arange(heads, dtype=np.int32).reshape(1, -1, 1, 1)),
            self.ranges[side],
        ]
        table = array.reshape(examples, heads, -1)
        return range_extreme(table, parts, f"{extreme}imum")


def _selected(literals: Term, equalities: Term) -> dict:
    """Returns where one-sided literals hold, and equalities may still do so."""
    masks = {}
    for node, positive in literals:
        mask, side = _possible(node.dense, positive), tuple(node.sides)
        masks[side] = masks[side] & mask if side in masks else mask
    for node, _ in equalities:
        for x, y in itertools.permutations(node.operands):
            if (mask := masks.get(tuple(y.sides))) is not None:
                allowed = _between(x.dense, *_span(y.dense, mask))
                masks[tuple(x.sides)] = masks.get(tuple(x.sides), TRUE) & allowed
    return masks


def _between(x: Interval, least, most):
    return (x.hi >= least) & (x.lo <= most)


def _span(x: Interval, mask):
    """Returns the extremes of a one-sided value over all that is selected."""
    xp: Any = namespace(*x, mask)
    least, most = extremes(x.lo.dtype)
    lo, hi = xp.where(mask, x.lo, most), xp.where(mask, x.hi, least)
    axes = (QUERY, KEY)
    return (
        xp.min(lo, axis=axes, keepdims=True, initial=most),
        xp.max(hi, axis=axes, keepdims=True, initial=least),
    )


def _possible(x: Interval, positive: bool):
    """Returns where a Boolean, or its negation, is possible."""
    return x.hi if positive else ~x.lo


def per_block(array, axis: int, size: int, extreme: str):
    """Reduces an axis block by block; one that is broadcast stays so."""
    length = array.shape[axis]
    if length == 1:
        return array
    xp = namespace(array)
    if extra := -length % size:
        widths = [(0, extra if i == axis else 0) for i in range(array.ndim)]
        array = xp.pad(array, widths, mode="edge")
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    cut = array.reshape(*before, -(-length // size), size, *after)
    return getattr(xp, extreme)(cut, axis + 1)


# Booleans as disjunctions of conjunctions of literals.


class Decision:
    """The values of nodes on every block, each Boolean decided as a whole."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.everything = _Selection(layout, decide=self.value)
        self.selections: dict[tuple[Term, Term], _Selection] = {}
        self.memo: dict[Node, Interval] = {}

    def value(self, node: Node) -> Interval:
        """Returns the values of a node."""
        if node not in self.memo:
            self.memo[node] = (
                Interval(~self._is_possible(node, False), self._is_possible(node, True))
                if _parts(node, True)
                else self.everything.value(node)
            )
        return self.memo[node]

    def _is_possible(self, node: Node, positive: bool):
        terms = _terms(node, positive)
        if terms is None:
            return _possible(self.everything.value(node), positive)
        return functools.reduce(operator.or_, map(self._is_satisfiable, terms), FALSE)

    def _is_satisfiable(self, term: Term):
        """Returns the blocks on which a conjunction may hold of some pair."""
        selection = self._selection(term)
        pairs = frozenset(x for x in term if x[0].dense is None)
        result = selection.is_inhabited()
        bands = find_bounds(pairs)
        differs = pairs != frozenset().union(*(band.literals for band in bands))
        for band in bands:
            if np.any(band.lo > band.hi):
                result = result & ((band.lo <= band.hi) | band.wraps(selection))
            # Where t = s is allowed, what is equal on a block is so within the band.
            has_zero = np.all((band.lo <= 0) & (band.hi >= 0))
            if pairs != band.literals and (differs or not has_zero):
                selection, inhabited = self._narrowed(band, selection)
                result = result & inhabited
        for node, positive in pairs:
            result = result & _possible(selection.value(node), positive)
        return result

    def _selection(self, term: Term) -> _Selection:
        """Returns what the one-sided literals of a term select."""
        literals = frozenset(x for x in term if x[0].dense is not None)
        selects = any(node.sides for node, _ in literals)
        key = literals, frozenset(filter(joins_sides, term) if selects else ())
        if key not in self.selections:
            self.selections[key] = _Selection(self.layout, _selected(*key))
        return self.selections[key]

    def _narrowed(self, bounds: Bounds, selection: _Selection):
        """Keeps of every block the rows and columns that a band passes through."""
        band = bounds.band(self.layout)
        if band is None:
            return selection, TRUE
        sides = {QUERY: band, KEY: (-band[1], -band[0])}
        indices = {
            side: selection.summary(point(index), {side})
            for side, index in self.layout.indices.items()
        }
        wraps, ranges, inhabited = bounds.wraps(selection), {}, TRUE
        for side, (lo, hi) in sides.items():
            (first, last), other = indices[side], indices[QUERY + KEY - side]
            xp = namespace(first, last, *other, wraps)
            least = xp.maximum(first, xp.where(wraps, first, other.lo + lo))
            most = xp.minimum(last, xp.where(wraps, last, other.hi + hi))
            inhabited = inhabited & (least <= most)
            end = np.int32(self.layout.indices[side].size - 1)
            clip = functools.partial(xp.clip, min=np.int32(0), max=end)
            ranges[side] = Interval(clip(least), clip(most))
        return _Selection(self.layout, selection.masks, ranges), inhabited


def _parts(node: Node, positive: bool) -> list[list[Literal]] | None:
    """Returns a connective as a disjunction of conjunctions of its operands."""
    if node.dense is not None or node.operation is None:
        return None
    name, operands = node.operation.name, node.operands
    avals = (*node.operation.operands, node.operation.result)
    if any(aval.shape or aval.dtype != np.bool_ for aval in avals):
        return None
    if name == "not":
        return [[(operands[0], not positive)]]
    if name in ("and", "or"):
        literals = [(x, positive) for x in operands]
        return [literals] if (name == "and") == positive else [[x] for x in literals]
    if name in ("xor", "ne", "eq"):
        x, y = operands
        same = (name == "eq") == positive
        return [[(x, True), (y, same)], [(x, False), (y, not same)]]
    if name == "select_n":
        which, *cases = operands
        return [[(which, bool(i)), (x, positive)] for i, x in enumerate(cases)]
    return None


def _terms(node: Node, positive: bool) -> list[Term] | None:
    """Returns the disjunctive normal form, or nothing if it is too long."""
    parts = _parts(node, positive)
    if parts is None:
        return [frozenset({(node, positive)})]
    result: dict[Term, None] = {}
    for conjunction in parts:
        factors = []
        for literal in conjunction:
            terms = _terms(*literal)
            if terms is None:
                return None
            factors.append(terms)
        for choice in itertools.product(*factors):
            term = frozenset().union(*choice)
            if not any((x, not holds) in term for x, holds in term):
                result[term] = None
            if len(result) > _MAX_TERMS:
                return None
    return list(result)
