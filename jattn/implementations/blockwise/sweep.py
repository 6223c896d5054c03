"""The log weights of every tile that is not empty, for views of the weights.

    weight = exp((logit − top) − log total)        the total of a query counts its sink

`top` and log total stay apart, as in `sums`: their sum is as large as the logits, and its
rounding would be an error of the weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.products import products_of
from jattn.implementations.blockwise.schedule import schedules
from jattn.implementations.blockwise.tiles import Tile, loop, over_heads, over_tiles


class Normalizer(NamedTuple):
    """What the logits of a query are lowered by, BTN each; `top` is a constant.

    Of one that sees nothing log total is +∞, so that its weights are 0.
    """

    top: jax.Array
    log_total: jax.Array


def log_weights(logits, allowed, normalizer: Normalizer):
    """Computes log weight = (logit − top) − log total for a tile; −∞ for masked pairs."""
    logs = (logits - normalizer.top[..., None]) - normalizer.log_total[..., None]
    return logs if allowed is None else jnp.where(allowed, logs, -jnp.inf)


def laid(layout: Layout, normalizer: Normalizer) -> Normalizer:
    """Lays the normalizer out as the queries; what pads it lets all weights be 0."""
    top, log_total = normalizer
    return Normalizer(layout.queries(top), layout.queries(log_total, fill=jnp.inf))


def rows_of(layout: Layout, normalizer: Normalizer, **at) -> Normalizer:
    """Gives the normalizer of a block of queries."""
    return Normalizer(*(layout.rows(x, **at) for x in normalizer))


class At(NamedTuple):
    """The place of a tile: its heads, its block of queries and its block of keys."""

    head: dict
    i: Any
    j: Any


def sweep(layout: Layout, normalizer, carry, start, step, finish, ordered=False):
    """Visits the log weights of every tile that is not empty, a query block at a time.

        part = start(carry)
        part = step(part, log_weights, at)      for each tile of the query block
        carry = finish(carry, part, i, head)

    `ordered` says that tiles must come in the order of their keys.
    """
    by_query, _ = schedules(layout)
    by_query = by_query.in_order() if ordered and by_query is not None else by_query
    normalizer = laid(layout, normalizer)

    def one_head(head, carry):
        def one_block(i, carry):
            query = layout.scaled(layout.rows(layout.query, T=i, **head.at))
            rows = rows_of(layout, normalizer, T=i, **head.at)

            def body(masked):
                def one_tile(j, part):
                    view = Tile(layout, head.aligned, i, j)
                    key = layout.cut(head.key, "BKS.", S=j)
                    logits = view.logits(products_of(layout, query, key), view.active)
                    allowed = view.allowed() if masked else None
                    logs = log_weights(logits, allowed, rows)
                    return step(part, logs, At(head.at, i, j))

                return one_tile

            count = layout.counts["S"]
            part = over_tiles(by_query, head, i, count, body, start(carry))
            return finish(carry, part, i, head.at)

        return loop(layout.counts["T"], one_block, carry)

    return over_heads(layout, one_head, carry)
