"""The steps of a kernel: which inner blocks each outer block meets, in which order.

    order   examples × heads × outer × inner: the numbers of inner blocks, full ones first,
            then partial ones, then empty ones
    full    examples × heads × outer: how many of them are full
    live    examples × heads × outer: how many are full or partial

So a kernel first visits the full blocks, without a mask, then the partial ones, and never
the empty ones. Examples and heads may be 1: then all of them share the steps.
"""

from typing import Any, NamedTuple

import jax

from jattn.blocks.kinds import visits


class Steps(NamedTuple):
    """The tables that a kernel reads."""

    order: jax.Array
    full: jax.Array
    live: jax.Array


def schedule(kinds: Any) -> Steps:
    """Makes the steps over kinds: B or 1 × N or 1 × outer × inner, NumPy's or traced."""
    return Steps(*visits(kinds))
