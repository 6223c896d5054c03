"""Booleans as disjunctions of conjunctions of literals, where these are short.

Short forms keep compile time about linear in the size of a function. k rules joined by `|`
have k conjunctions. Their complement has 2^k conjunctions, but absorption often leaves two:

    (a & x) | (a & y)   complement:  ~a | (~x & ~y)    not  ~a | (~a & ~y) | (~x & ~a) | …

A Boolean whose form is longer than `_MANY` literals for each atom gets no form; then its
parts are decided one by one.
"""

import itertools
import math

import numpy as np

from jattn.blocks.graph import Node

Literal = tuple[Node, bool]  # a node, and whether it holds
Term = frozenset[Literal]  # the conjunction of its literals

# How many literals a normal form may have for each of its atoms; it limits compile time.
_MANY = 4
_FEW_ATOMS = 8  # a form of fewer atoms may be as long as one of so many


class Formulas:
    """The disjunctive normal forms of Booleans, each made once."""

    def __init__(self):
        self.forms: dict[Literal, list[Term] | None] = {}
        self.counted: dict[Node, frozenset[Node]] = {}

    def terms(self, node: Node, positive: bool) -> list[Term] | None:
        """Returns the form of a Boolean or of its negation; None if it is too long."""
        key = node, positive
        if key not in self.forms:
            self.forms[key] = self._terms(node, positive)
        return self.forms[key]

    def _terms(self, node: Node, positive: bool) -> list[Term] | None:
        choices = parts(node, positive)
        if choices is None:
            return [frozenset({(node, positive)})]
        most = _MANY * max(len(self.atoms(node)), _FEW_ATOMS)
        result: list[Term] = []
        for conjunction in choices:
            factors = []
            for literal in conjunction:
                terms = self.terms(*literal)
                if terms is None:
                    return None
                factors.append(terms)
            # Checked before the product is made, which may be exponentially long.
            if math.prod(map(len, factors)) > most:
                return None
            for choice in itertools.product(*factors):
                result = _absorbed(result, frozenset().union(*choice))
            if sum(map(len, result)) > most:
                return None
        return result

    def atoms(self, node: Node) -> frozenset[Node]:
        """Returns the atoms of a Boolean: its parts that are not made of Booleans."""
        if node not in self.counted:
            choices = parts(node, True)
            operands = node.operands if choices else ()
            atoms = frozenset().union(*map(self.atoms, operands))
            self.counted[node] = atoms if choices else frozenset({node})
        return self.counted[node]


def parts(node: Node, positive: bool) -> list[list[Literal]] | None:
    """Returns a connective as a disjunction of conjunctions; None for other nodes."""
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


def _absorbed(terms: list[Term], term: Term) -> list[Term]:
    """Adds a term, unless it contradicts itself or contains all literals of another one.

    (a & x) | a is a, so a term with more literals adds nothing. Likewise, the new term
    replaces all terms that contain its literals.
    """
    if any((x, not holds) in term for x, holds in term):
        return terms
    if any(other <= term for other in terms):
        return terms
    return [*(other for other in terms if not term <= other), term]
