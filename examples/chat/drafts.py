"""Drafts: several tokens are guessed, and one call of the model verifies them all.

Texts repeat themselves. So a guess is what followed when the last words stood in the text
before; where they were followed by different words, the guesses are a tree. Its root is the
token that was drawn last. One call attends from all nodes:

    state = merge(state over the cache, state over the node's ancestors and itself)

At each node the token is drawn that would be drawn there without drafts. Where a child of
the node has that token, the guess was right, and the child is the next node. The path of
right guesses is appended to the cache, and nothing else was stored. So the words are the
same, and the calls are fewer.

References:
    Saxena, 2023, "Prompt lookup decoding"; Miao et al., 2024, arXiv:2305.09781 (trees).
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jattn
from examples.chat import layers, model
from examples.chat.model import Sizes
from examples.chat.sampling import draw
from examples.chat.writing import Writer

LONGEST = 3  # tokens that must have stood before in the same order; then 2, then 1


class Tree(NamedTuple):
    """Guesses after a root; each node stands after its parent in the lists."""

    tokens: list[int]
    parents: list[int]  # the number of a node; −1 for the root's

    def depths(self) -> list[int]:
        """Says how many ancestors each node has."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def ancestors(self) -> np.ndarray:
        """Says which nodes each node sees, itself and its ancestors: `TT`."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def guess(text: Sequence[int], size: int, ends: Collection[int] = ()) -> Tree:
    """Looks up what followed the last tokens of a text before.

    Args:
        text: All tokens so far; the last is the root.
        size: How many guesses at most.
        ends: Tokens that end a text. They are never guessed, so nothing after one is ever
            stored.

    Returns:
        The root and up to `size` guesses: the latest place first, and where another place
        went on differently, a branch.
    """
    tree = Tree([text[-1]], [-1])
    for length in range(LONGEST, 0, -1):
        tail = list(text[-length:])
        for end in range(len(text) - 1, length - 1, -1):
            if list(text[end - length : end]) == tail:
                branch = itertools.takewhile(
                    lambda x: x not in ends, text[end : end + size]
                )
                _grow(tree, branch, size + 1)
            if len(tree.tokens) > size:
                return tree
    return tree


def _grow(tree: Tree, branch: Iterable[int], most: int) -> None:
    """Adds a branch from the root on; what is there already is not added again."""
    node = 0
    for token in branch:
        pairs = zip(tree.tokens, tree.parents, strict=True)
        found = [i for i, pair in enumerate(pairs) if i and pair == (token, node)]
        if not found:
            if len(tree.tokens) == most:
                return
            tree.tokens.append(token)
            tree.parents.append(node)
        node = found[0] if found else len(tree.tokens) - 1


def verify(params, kv, tokens, parents, depth, seen, rng, *, sizes: Sizes, sampling):
    """Draws a token at each node, and appends the path of right guesses to the cache.

    Args:
        params: The weights.
        kv: The cache of all layers, of one example; it is used up.
        tokens: Those of the nodes, `T`; a node that is none has a parent that is itself.
        parents: Those of the nodes, `T`.
        depth: How many ancestors each has, `T`.
        seen: Which nodes each sees, `TT`.
        rng: The random number of the text.
        sizes: Those of the model.
        sampling: How freely tokens are drawn.

    Returns:
        The tokens that were drawn at the nodes `T`, the numbers of the nodes on the path in
        order `T`, how many these are, and the cache.
    """
    alone = {name: params[name] for name in ("embedding", "norm")}
    x, made, turn, position = _begin(alone, sizes, kv, tokens, depth)
    attend = Partial(_attend, sizes, seen)
    x, (kv, made) = model.through(params["layers"], sizes, x, (kv, made), turn, attend)
    return _end(alone, sizes, kv, x, made, tokens, parents, position, rng, sampling)


@jax.jit
def _begin(params, sizes: Sizes, kv, tokens, depth):
    position = layers.lengths(kv, sizes) + depth
    x, turn = model.begin(params, sizes, tokens[None], position[None])
    shape = 2, sizes.layers, tokens.size, sizes.kv_heads, sizes.head_size
    return x, jnp.zeros(shape, x.dtype), turn, position


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("kv",))
def _end(params, sizes, kv, x, made, tokens, parents, position, rng, sampling):
    logits = model.logits(params, model.norm(x[0], params["norm"], sizes.epsilon))
    drawing = jax.vmap(lambda logits, place: draw(logits, rng, place, sampling)[0])
    drawn = drawing(logits, position + 1)
    right = _right(tokens, parents, drawn)
    path, count = jnp.argsort(~right, stable=True), jnp.sum(right, dtype=jnp.int32)
    key, value = jnp.take(made, path, axis=2)
    return drawn, path, count, kv.append(key, value, count=count)


def _attend(sizes: Sizes, seen, carry, layer, query, key, value):
    """Attends to the cache and to the tree, and keeps the tree's keys and values."""
    kv, made = carry
    zero = jnp.zeros((), jnp.int32)
    past, _ = layers.of_layer(kv, sizes, layer, zero, 1)
    tree = jattn.attention_state(query, key, value, mask=seen)
    output = jattn.merge(past.attend_state(query), tree).output
    new = jnp.concatenate([key, value])[:, None]  # 2, one layer, T, K, H
    made = jax.lax.dynamic_update_slice(made, new, (zero, layer, zero, zero, zero))
    return output, (kv, made)


def _right(tokens, parents, drawn) -> jax.Array:
    """Says which nodes are on the path: the root, and what a right parent has drawn."""
    right = [jnp.ones((), bool)]
    for node in range(1, tokens.size):  # a few, and each after its parent
        parent = parents[node]
        before = jnp.where(
            parent < node, jnp.stack(right)[jnp.minimum(parent, node - 1)], False
        )
        right.append(before & (drawn[parent] == tokens[node]))
    return jnp.stack(right)


def write(
    writer: Writer,
    text: Sequence[int],
    ends: Collection[int],
    most: int,
    size: int,
    stopped: Callable = bool,
) -> Iterator[int]:
    """Writes on as `writing.write` does, of one text, with fewer calls.

    Args:
        writer: Its cache holds all tokens of the text but the last.
        text: All tokens so far; the last was drawn and counts as written.
        ends: The tokens that end the text.
        most: How many tokens to write, that one included.
        size: How many guesses to verify at once.
        stopped: Asked before each call whether to write no more.

    Yields:
        The tokens; the last of them is not in the cache.
    """
    text, rng = list(text), writer.rng(0)
    left = most - 1
    yield text[-1]
    while left and text[-1] not in ends and not stopped():
        # No more guesses than are wanted, so that the cache holds what was written.
        tree = guess(text, min(size, left - 1), ends)
        for token in verified(writer, tree, rng, size):
            text.append(token)
            left -= 1
            yield token
            if token in ends:
                return


def verified(writer: Writer, tree: Tree, rng, size: int) -> list[int]:
    """Calls the model once, and gives what it draws along the path of right guesses."""
    nodes, more = len(tree.tokens), size + 1 - len(tree.tokens)
    alone = list(range(nodes, size + 1))  # no nodes: their own parents, and right for none
    seen = np.eye(size + 1, dtype=bool)
    seen[:nodes, :nodes] = tree.ancestors()
    lists = tree.tokens + [0] * more, tree.parents + alone, tree.depths() + [0] * more
    arrays = (jnp.asarray(x, jnp.int32) for x in lists)
    fixed = {"sizes": writer.sizes, "sampling": writer.sampling}
    drawn, path, count, writer.kv = verify(
        writer.params, writer.kv, *arrays, jnp.asarray(seen), rng, **fixed
    )
    writer.calls += 1
    drawn, path = np.asarray(drawn), np.asarray(path)
    return [int(drawn[node]) for node in path[: int(count)]]
