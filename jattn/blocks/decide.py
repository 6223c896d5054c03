"""Decides Booleans on all pairs of blocks at once, from the graph of a mask.

A Boolean is written as a disjunction of conjunctions of literals (see `formulas`). In a
conjunction the one-sided literals select rows and columns; the two-sided literals are
evaluated on intervals over the selected rows and columns only; and bounds on the same sum
of positions must agree. A Boolean is impossible on a block if none of its conjunctions can
hold there. It is certain there if none of its complement's conjunctions can hold.
"""

import functools
import operator
from typing import Any

import numpy as np

from jattn.blocks.bounds import (
    FALSE,
    TRUE,
    Bounds,
    Layout,
    find_bounds,
    joins_sides,
)
from jattn.blocks.formulas import Formulas, Literal, Term, parts
from jattn.blocks.graph import KEY, QUERY, Node
from jattn.blocks.intervals import (
    Interval,
    namespace,
    point,
)
from jattn.blocks.select import _possible, _selected, _Selection

# How often a node may be evaluated on selected rows and columns, on average. It keeps the
# work linear in the size of the function.
_EFFORT = 4
_FEW_NODES = 32  # a smaller function may take as much work as one of so many nodes


class Decision:
    """The values of nodes on every block, each Boolean decided as a whole.

    The work is linear in the size of the function: where selecting rows and columns for
    every conjunction would take more, literals are evaluated on whole blocks instead.

    Attributes:
        layout: The sides and their blocks.
        order: The nodes of the function and their numbers.
        everything: The values on whole blocks.
        selections: The values on selected rows and columns.
    """

    def __init__(self, layout: Layout, root: Node):
        self.layout = layout
        self.order = _numbered(root)
        self.everything = _Selection(layout, operand=self.value)
        self.selections: list[_Selection] = []
        self.formulas = Formulas()
        self.memo: dict[Any, Any] = {}

    @property
    def is_tired(self) -> bool:
        """Says whether the work on selections has reached its limit."""
        spent = sum(x.effort for x in self.selections)
        return spent > _EFFORT * max(len(self.order), _FEW_NODES)

    def _once(self, key, function, *arguments):
        """Calls a function once for each key; later calls return the first result."""
        if key not in self.memo:
            self.memo[key] = function(*arguments)
        return self.memo[key]

    def value(self, node: Node) -> Interval:
        """Returns the values of a node."""
        if not parts(node, True):
            return self.everything.value(node)
        # A Boolean is certain where its negation is impossible.
        possible = [self._is_possible(node, positive) for positive in (False, True)]
        return Interval(~possible[0], possible[1])

    def _is_possible(self, node: Node, positive: bool):
        """Says on which blocks a Boolean, or its negation, may hold for some pair."""
        key = node, positive
        if key not in self.memo:
            terms = self.formulas.terms(node, positive)
            if terms is None:  # the form is too long: decide each part by itself
                found = [self._are_possible(x) for x in parts(node, positive) or ()]
            else:
                found = [self._once(x, self._is_satisfiable, x) for x in terms]
            self.memo[key] = functools.reduce(operator.or_, found, FALSE)
        return self.memo[key]

    def _are_possible(self, literals: list[Literal]):
        """Says where each literal is possible, though perhaps not all for one pair."""
        result = TRUE
        for node, positive in literals:
            result = result & self._is_possible(node, positive)
        return result

    def _is_satisfiable(self, term: Term):
        """Says on which blocks a conjunction may hold for some pair."""
        is_tired, literals = self.is_tired, sorted(term, key=self._place)
        selection = self.everything if is_tired else self._selection(literals)
        # The literals that see both sides; `dense` ones see at most one side.
        pairs = [x for x in literals if x[0].dense is None]
        result = selection.is_inhabited()
        bands = find_bounds(pairs)
        differs = len(pairs) != len(frozenset().union(*(x.literals for x in bands)))
        for band in bands:
            if band.may_contradict():
                result = result & ((band.lo <= band.hi) | band.wraps(selection))
            # Narrowing the blocks to the band gains nothing if the band holds t = s and
            # all other literals set bounds too: an equality that holds somewhere on a
            # block, such as doc[t] == doc[s], then holds within the band.
            others = len(pairs) > len(band.literals)
            if others and not is_tired and (differs or not band.holds_zero()):
                key = band.literals, selection
                selection, inhabited = self._once(key, self._narrow, band, selection)
                result = result & inhabited
        for node, positive in pairs:
            result = result & _possible(selection.value(node), positive)
        return result

    def _place(self, literal: Literal):
        """Returns the place of a literal, so that one function always makes one program."""
        node, positive = literal
        return self.order[node], positive

    def _selection(self, term: list[Literal]) -> _Selection:
        """Returns the rows and columns that the one-sided literals of a term select."""
        literals = tuple(x for x in term if x[0].dense is not None)
        if not literals:
            return self.everything
        selects = any(node.sides for node, _ in literals)
        equalities = tuple(filter(joins_sides, term)) if selects else ()
        return self._once((literals, equalities), self._selecting, literals, equalities)

    def _selecting(self, literals, equalities) -> _Selection:
        return self._select(_selected(literals, equalities), None)

    def _select(self, masks, ranges) -> _Selection:
        self.selections.append(_Selection(self.layout, masks, ranges))
        return self.selections[-1]

    def _narrow(self, bounds: Bounds, selection: _Selection):
        """Narrows every block to the rows and columns that a band passes through."""
        band = bounds.band(self.layout)
        if band is None:
            return selection, TRUE
        # Where lo ≤ row − column ≤ hi, column + lo ≤ row ≤ column + hi, and
        # row − hi ≤ column ≤ row − lo.
        sides = {QUERY: band, KEY: (-band[1], -band[0])}
        indices = {
            side: selection.summary(point(index), {side})
            for side, index in self.layout.indices.items()
        }
        wraps, ranges, inhabited = bounds.wraps(selection), {}, TRUE
        for side, (lo, hi) in sides.items():
            (first, last), other = indices[side], indices[QUERY + KEY - side]
            xp = namespace(first, last, *other, wraps, lo, hi)
            # Where the positions may wrap around, the band says nothing.
            least = xp.maximum(first, xp.where(wraps, first, other.lo + lo))
            most = xp.minimum(last, xp.where(wraps, last, other.hi + hi))
            inhabited = inhabited & (least <= most)
            end = np.int32(self.layout.indices[side].size - 1)
            clip = functools.partial(xp.clip, min=np.int32(0), max=end)
            ranges[side] = Interval(clip(least), clip(most))
        return self._select(selection.masks, ranges), inhabited


def _numbered(root: Node) -> dict[Node, int]:
    """Numbers a node and its operands, down to the first ones that see one side only."""
    result: dict[Node, int] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node not in result:
            result[node] = len(result)
            waiting.extend(node.operands if node.dense is None else ())
    return result
