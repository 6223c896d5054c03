"""Sums of nodes, such as t − s + 3, in the nodes that they are made of."""

from jattn.blocks.graph import Node


def linear(sum_of: dict[Node, int]) -> tuple[dict[Node, int], list]:
    """Writes a sum of nodes, each times its count, in the nodes that are no sums.

    Returns:
        The count of each node; and counts with arrays, for the nodes whose value is the
        same for all rows and columns.
    """
    counts, known = dict(sum_of), []
    for node in reversed(sums(*sum_of)):
        count = counts.pop(node)
        x, y = node.operands
        counts[x] = counts.get(x, 0) + count
        counts[y] = counts.get(y, 0) + (count if name_of(node) == "add" else -count)
    for node in list(counts):
        lo, hi = node.dense or (None, None)
        if lo is not None and lo is hi and not node.sides:
            known.append((counts.pop(node), lo))
    return counts, known


def sums(*nodes: Node) -> list[Node]:
    """Returns the sums and differences that nodes are made of, each once, parts first.

    A sum may be a part of many others: the work is linear in their number.
    """
    result: dict[Node, None] = {}
    waiting = [(node, False) for node in nodes]
    while waiting:
        node, is_done = waiting.pop()
        if node in result or name_of(node) not in ("add", "sub"):
            continue
        if is_done:
            result[node] = None
        else:
            waiting += [(node, True), *((x, False) for x in node.operands)]
    return list(result)


def name_of(node: Node) -> str | None:
    """Returns the name of the primitive that computes a node; None for an input."""
    return node.operation.name if node.operation else None
