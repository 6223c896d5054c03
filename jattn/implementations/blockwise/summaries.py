"""Summaries of the weights, tile by tile: their entropy, and what each key receives.

Both summaries are operations, with derivatives of every order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem
from jattn.implementations.blockwise.join import join
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import Plan, plan, rows_plan
from jattn.implementations.blockwise.sweep import (
    Normalizer,
    laid,
    log_weights,
    rows_of,
    sweep,
)
from jattn.implementations.blockwise.tiles import Tile
from jattn.implementations.blockwise.whole_rows import row_logits
from jattn.operations.join import Joined, Leading
from jattn.operations.operation import Operation, retype

# The share of a key that is left out of sums. Two equal keys have a half each, which may be
# rounded to more; so it is clearly more than a half.
_MOST = 0.6


class Surprise(NamedTuple):
    """−weight · log weight of a key, and its weight; or sums of both."""

    surprise: jax.Array
    weight: jax.Array


def entropy(
    problem: Problem, operands: Operands, normalizer: Normalizer, whole: bool, tile=None
) -> Surprise:
    """Sums up −weightₛ log weightₛ over the keys, and weightₛ, BTN each.

    Unless the `whole` is wanted, both leave out a key with more than `_MOST` of the weight,
    whose logarithm has lost its digits; see `surprise_of_largest`.
    """
    B, N, T, _ = problem.sizes.BNTS
    if problem.sizes.are_nothing:
        zeros = jnp.zeros((B, T, N), problem.wide)
        return Surprise(zeros, zeros)
    leaves, tree = jax.tree.flatten(operands)
    return Surprise(*Entropy(problem, tree, tile, whole)(*leaves, *normalizer))


def received(
    problem: Problem, operands: Operands, normalizer: Normalizer, tile=None
) -> jax.Array:
    """Sums up the weights of each key over all queries, BSN."""
    B, N, _, S = problem.sizes.BNTS
    if problem.sizes.are_nothing:
        return jnp.zeros((B, S, N), problem.wide)
    leaves, tree = jax.tree.flatten(operands)
    return Received(problem, tree, tile)(*leaves, *normalizer)[0]


def surprise(log_weights, whole: bool) -> Surprise:
    """Computes −weight · log weight and the weight, 0 for those that are left out."""
    weights = jnp.exp(log_weights)
    # The inner `where` keeps 0 · ∞ out of the derivative, which a `where` outside does not.
    none = weights == 0 if whole else (weights == 0) | (weights > _MOST)
    weights = jnp.where(none, 0, weights)
    return Surprise(-weights * jnp.where(none, 0, log_weights), weights)


def surprise_of_largest(rest):
    """Computes −weight · log weight of the key with more than `_MOST`, 0 if there is none.

    Its weight is 1 − rest, where `rest` is the sum of all other weights, the sink's too:

        −weight · log weight = −(1 − rest) · log(1 − rest)

    The logarithm of a weight near 1 is a small difference of large numbers, but `rest` has
    all its digits. Where no key has so much, the rest is 1, to the last places.
    """
    rest = jnp.where(rest < 0.75, rest, 0)  # it is 1 − _MOST at most, or about 1
    return -(1 - rest) * jnp.log1p(-rest)


@dataclasses.dataclass(frozen=True)
class _View(Operation):
    """An operation on the leaves of `Operands` and the two numbers of the normalizer."""

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
        found = join(self.problem, self.tree, size, mapped[:-2], apart[:-2])
        if found is None:
            return None
        problem, slots = found
        whole = Leading(size, self.problem.sizes.B, apart=True)
        operation = dataclasses.replace(self, problem=problem)
        return Joined(operation, (*slots, whole, whole), (whole,) * self.outputs)

    def lay(self, leaves, plan: Plan):
        """Lays out the call, and separates the normalizer from its leaves."""
        *leaves, top, log_total = leaves
        layout = Layout(self.problem, self.tree.unflatten(leaves), plan)
        return layout, Normalizer(top, log_total)

    def by_rows(self, leaves, function):
        """Lays out the call in whole rows.

        Also gives a function of a block number: it applies `function` to the log weights
        of that block of rows. Backward computes the log weights again, so that no T × S of
        them is kept.
        """
        layout, normalizer = self.lay(leaves, rows_plan(self.problem))
        key = jnp.moveaxis(layout.key.astype(self.problem.wide), 2, 1)
        normalizer = laid(layout, normalizer)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_block(i):
            view = Tile(layout, layout.aligned, i, 0)
            logits, allowed = row_logits(layout, view, key, i)
            return function(log_weights(logits, allowed, rows_of(layout, normalizer, T=i)))

        return layout, of_block


@dataclasses.dataclass(frozen=True)
class Entropy(_View):
    """The two sums of `entropy` for each query."""

    whole: bool = False

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
        layout, normalizer = self.lay(leaves, self.plan(spread))
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
        return [layout.unqueries(x) for x in totals]

    def reference(self, *leaves):
        """Computes them a few whole rows at a time."""
        layout, of_block = self.by_rows(leaves, self.sums)
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
        layout, normalizer = self.lay(leaves, self.plan(spread))
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
        layout, of_block = self.by_rows(leaves, lambda x: self.columns(layout, x))
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
