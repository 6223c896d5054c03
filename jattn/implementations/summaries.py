"""Summaries of the weights, tile by tile: their entropy, and what each key receives.

Both summaries are operations, with derivatives of every order. Backward takes a few whole
rows at a time. There the derivative of a weight is one product, weight (d − mean of d), and
no two sums over all queries have to cancel each other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem
from jattn.implementations.blockwise.join import join
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import Plan, plan, rows_plan
from jattn.implementations.blockwise.sweep import log_weights, sweep
from jattn.implementations.blockwise.tiles import Tile
from jattn.implementations.blockwise.whole_rows import row_logits
from jattn.implementations.normalize import normalizer, normalizer_of
from jattn.implementations.surprise import Surprise, surprise, with_sink
from jattn.operations.join import Joined, Leading
from jattn.operations.operation import Operation, retype


def entropy(problem: Problem, operands: Operands, sink, logsumexp, tile=None) -> Surprise:
    """Sums up −weightₛ log weightₛ over the keys and the sink, and weightₛ, BTN each.

    Without a given logsumexp, both leave out a key with more than `_MOST` of the weight,
    whose logarithm has lost its digits; see `surprise_of_largest`. With one the weights may
    add up to other than 1.
    """
    B, N, T, _ = problem.sizes.BNTS
    if problem.sizes.are_nothing:
        zeros = jnp.zeros((B, T, N), problem.wide)
        return Surprise(zeros, zeros)
    leaves, tree = jax.tree.flatten((operands, _by_example(sink), logsumexp))
    return Surprise(*Entropy(problem, tree, tile)(*leaves))


def received(problem: Problem, operands: Operands, sink, logsumexp, tile=None) -> jax.Array:
    """Sums up the weights of each key over all queries, BSN."""
    B, N, _, S = problem.sizes.BNTS
    if problem.sizes.are_nothing:
        return jnp.zeros((B, S, N), problem.wide)
    leaves, tree = jax.tree.flatten((operands, _by_example(sink), logsumexp))
    return Received(problem, tree, tile)(*leaves)[0]


def _by_example(sink):
    """Gives the sink of each head as B1N, with B = 1: an axis of `vmap` joins the first."""
    return None if sink is None else sink[None, None]


@dataclasses.dataclass(frozen=True)
class _View(Operation):
    """An operation on the leaves of (operands, sink, logsumexp); the last two may be None.

    Attributes:
        problem: The call.
        tree: The structure of the three.
        tile: How many queries and keys a tile has; replaces the choice of `plan`.
    """

    problem: Problem
    tree: Any
    tile: tuple[int, int] | None = None

    @property
    def elements(self) -> int:
        """Gives the number of pairs in two tiles."""
        B, K, G, T, S, *_ = self.plan(spread=False)
        return 2 * B * K * G * T * S

    def plan(self, spread: bool) -> Plan:
        """Chooses the sizes of tiles; a sweep computes partial ones whole."""
        return plan(self.problem, spread, self.tile).halved()

    def joined(self, size, mapped, apart):
        """Joins the slices into a call with more examples; None if they share keys."""
        operands, *others = self.tree.unflatten(mapped)
        mapped, tree = jax.tree.flatten(operands)
        found = join(self.problem, tree, size, mapped, apart[: len(mapped)])
        if found is None:
            return None
        problem, slots = found
        whole = Leading(size, self.problem.sizes.B, apart=True)
        slots = *slots, *(whole for x in others if x is not None)
        operation = dataclasses.replace(self, problem=problem)
        return Joined(operation, slots, (whole,) * self.outputs)

    def lay(self, leaves, spread: bool):
        """Lays out the call; gives the sink and the normalizer of its rows as well."""
        operands, sink, logsumexp = self.tree.unflatten(leaves)
        rows = normalizer(self.problem, operands, sink, logsumexp)
        return Layout(self.problem, operands, self.plan(spread)), sink, rows

    def by_rows(self, leaves, function):
        """Lays out the call in whole rows.

        Also gives a function of a block number: it applies `function` to the log weights
        of that block of rows, their sink and their normalizer. Backward computes the log
        weights again, so that no T × S of them is kept.
        """
        operands, *others = self.tree.unflatten(leaves)
        layout = Layout(self.problem, operands, rows_plan(self.problem))
        key = jnp.moveaxis(layout.key.astype(self.problem.wide), 2, 1)
        B, N, T, _ = self.problem.sizes.BNTS
        nothing = jnp.zeros((B, T, N), self.problem.wide)
        others = [None if x is None else layout.queries(nothing + x) for x in others]
        # What pads the queries has +∞ in its log total, and weights of 0.
        padding = layout.queries(nothing, fill=jnp.inf)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_block(i):
            view = Tile(layout, layout.aligned, i, 0)
            logits, allowed = row_logits(layout, view, key, i)
            own = lambda x: None if x is None else layout.rows(x, T=i)
            sink, logsumexp = map(own, others)
            rows = normalizer_of(logits, sink, logsumexp)
            rows = rows._replace(log_total=rows.log_total + layout.rows(padding, T=i))
            return function(log_weights(logits, allowed, rows), sink, rows)

        return layout, of_block


@dataclasses.dataclass(frozen=True)
class Entropy(_View):
    """The two sums of `entropy` for each query."""

    @property
    def whole(self) -> bool:
        """Says whether the weight of the largest key counts: if a logsumexp is given."""
        return self.tree.unflatten(range(self.tree.num_leaves))[2] is not None

    @property
    def outputs(self) -> int:
        """Counts the two sums."""
        return len(Surprise._fields)

    def types(self, *types):
        """Gives the types of the outputs, BTN."""
        query, (B, N, T, _) = types[0], self.problem.sizes.BNTS
        rows = retype(query, (B, T, N), self.problem.wide, query.sharding.spec[:3])
        return [rows] * self.outputs

    def fast(self, *leaves, spread):
        """Computes them tile by tile."""
        layout, sink, normalizer = self.lay(leaves, spread)
        rows = (layout.plan.B, layout.plan.K, layout.plan.G * layout.plan.T)
        put = lambda i, at: lambda x, part: layout.put_rows(x, part, T=i, **at)
        totals = sweep(
            layout,
            normalizer,
            self.nothing(layout.query.shape[:3]),
            start=lambda totals: self.nothing(rows),
            step=lambda part, logs, at: jax.tree.map(jnp.add, part, self.sums(logs)),
            finish=lambda totals, part, i, at: jax.tree.map(put(i, at), totals, part),
        )
        totals = Surprise(*map(layout.unqueries, totals))
        return with_sink(totals, sink, normalizer, self.whole)

    def reference(self, *leaves):
        """Computes them a few whole rows at a time."""
        sums = lambda logs, sink, rows: with_sink(self.sums(logs), sink, rows, self.whole)
        layout, of_block = self.by_rows(leaves, sums)
        parts = jax.lax.map(of_block, jnp.arange(layout.counts["T"]))
        pairs = zip(self.nothing(layout.query.shape[:3]), parts, strict=True)
        return [layout.unqueries(layout.put_row_blocks(x, part)) for x, part in pairs]

    def nothing(self, shape) -> Surprise:
        """Makes zeros for both sums."""
        return Surprise(*(jnp.zeros(shape, self.problem.wide),) * self.outputs)

    def sums(self, log_weights) -> Surprise:
        """Sums up over the keys of a tile."""
        each = surprise(log_weights, self.whole)
        return Surprise(*(jnp.sum(x, axis=-1) for x in each))


class Received(_View):
    """The sums of the weights of each key over all queries."""

    def types(self, *types):
        """Gives the type of the output, BSN."""
        key, (B, N, _, S) = types[1], self.problem.sizes.BNTS
        return [retype(key, (B, S, N), self.problem.wide, key.sharding.spec[:3])]

    def fast(self, *leaves, spread):
        """Computes it tile by tile."""
        layout, _, normalizer = self.lay(leaves, spread)
        # The sums are over queries, so one total passes through all query blocks.
        total = self.nothing(layout)
        add = lambda total, logs, at: layout.add(
            total, self.columns(layout, logs), "BKGS", S=at.j, **at.head
        )
        keep = lambda total, part, i, at: part
        total = sweep(layout, normalizer, total, lambda total: total, add, keep)
        return [self.as_keys(total)]

    def reference(self, *leaves):
        """Computes it a few whole rows at a time."""
        layout, of_block = self.by_rows(leaves, lambda x, *_: self.columns(layout, x))
        step = lambda total, i: (total + of_block(i), None)
        total, _ = lax.scan(step, self.nothing(layout), jnp.arange(layout.counts["T"]))
        return [self.as_keys(total)]

    def nothing(self, layout: Layout):
        """Makes zeros BKGS, padded like the keys."""
        B, K, G = self.problem.sizes.B, self.problem.sizes.K, self.problem.sizes.G
        return jnp.zeros((B, K, G, layout.padded["S"]), self.problem.wide)

    def columns(self, layout: Layout, log_weights):
        """Sums up the weights of a tile BK(GT)S over its queries, BKGS."""
        return jnp.sum(layout.by_head(jnp.exp(log_weights)), axis=3)

    def as_keys(self, total):
        """Removes the padding of BKGS and reshapes it to BSN."""
        B, N, _, S = self.problem.sizes.BNTS
        return jnp.swapaxes(total[..., :S].reshape(B, N, S), 1, 2)
