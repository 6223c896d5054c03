"""Which functions may answer −∞ at all, so that asking where they do is worth the work."""

import jax.numpy as jnp
import numpy as np

from jattn.blocks import rearrange as rearrange  # registers its rules
from jattn.blocks import rules as rules  # likewise
from jattn.blocks.graph import _FINITE, _MAX_DEPTH, _PRODUCTS, Node
from jattn.blocks.intervals import (
    Interval,
    has_rule,
)


def may_be_infinite(node: Node) -> bool:
    """Says whether a number may be ±∞ on a whole block, from the parts it is made of.

    A traced array may hold anything. But a traced factor of a product is taken to be
    finite, since blocks hidden by such products are too rare to evaluate all products for
    them. That is sound: at worst, blocks that could be skipped are not.
    """
    return _may_be_infinite(node, {}, 0)


def _may_be_infinite(node: Node, known: dict[Node, bool], depth: int) -> bool:
    if node not in known:
        known[node] = depth > _MAX_DEPTH or _has_infinite_part(node, known, depth)
    return known[node]


def _has_infinite_part(node: Node, known: dict[Node, bool], depth: int) -> bool:
    operation = node.operation
    if node.dense is not None and (operation is None or _is_known(node.dense)):
        lo, hi = node.dense
        if not jnp.issubdtype(lo.dtype, jnp.floating):
            return False
        return not _is_known(node.dense) or bool((np.isinf(lo) | np.isinf(hi)).any())
    if not jnp.issubdtype(operation.result.dtype, jnp.floating):
        return False
    # Without a rule the result is unknown, so it is never surely −∞ on a whole block.
    if not has_rule(operation.name) or operation.name in _FINITE:
        return False
    parts = node.operands
    if operation.name in _PRODUCTS:
        parts = [x for x in parts if x.dense is None or _is_known(x.dense)]
    return any(_may_be_infinite(x, known, depth + 1) for x in parts)


def _is_known(x: Interval) -> bool:
    return isinstance(x.lo, np.ndarray) and isinstance(x.hi, np.ndarray)
